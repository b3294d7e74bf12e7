import dataclasses
import json
import os
import pickle
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip import files
from blip.data import loader
from blip.data.draws import Draws
from blip.data.formats.sources import Record, open_sources
from blip.data.ledger import Ledger
from blip.data.prepare.captions import PrepareCaptions
from blip.data.settings import DataConfig, SourceConfig
from blip.data.transforms import EvalTransform, TrainTransform
from blip.errors import BadSample, DataError, StuckSample, TooManyBad
from blip.objectives.batch import Bad
from blip.tokenizer import Tokenizer

SIZE = 16


class Made:
    """A source of numbered images; `bad` rows are unreadable, `does` is done before a row is given."""

    def __init__(self, n, *, name="made", weight=1.0, bad=(), captions=1, does=None):
        self.n, self.name, self.weight, self.bad, self.does = n, name, weight, frozenset(bad), does
        self.kind, self.captions = "human", captions

    def __len__(self):
        return self.n

    def key(self, row):
        return f"{self.name}:{row}"

    def identity(self):
        return f"{self.name} {self.n}"

    def __getitem__(self, row):
        if self.does:
            self.does(row)
        if row in self.bad:
            raise BadSample("made so")
        image = np.full((24, 24, 3), row % 256, np.uint8)
        image[: row % 24] = 255
        captions = [f"image {row} words {c}" for c in range(self.captions)]
        return Record(self.key(row), Image.fromarray(image), captions)


def config(**changes):
    return DataConfig(**{"workers": 0, "worker_timeout": 20.0, **changes})


def pairs(tokenizer, *sources, seed=0, train=True, **changes):
    c = config(**changes)
    transform = TrainTransform(SIZE, c) if train else EvalTransform(SIZE)
    return draws(sources or [Made(10)], transform, tokenizer, c, seed)


def draws(sources, transform, tokenizer, config, seed):
    return Draws(sources, PrepareCaptions(transform, tokenizer, config), seed)


def load(p, *, batch=4, rank=0, world=1, start=0, steps=6, **changes):
    changed = {"workers": 0, "worker_timeout": 20.0, **changes}
    p.prepare = dataclasses.replace(p.prepare, config=dataclasses.replace(p.prepare.config, **changed))
    return p.batches(start, steps - start, rank, world, batch)


def same(a, b):
    return a.keys == b.keys and torch.equal(a.image, b.image) and torch.equal(a.ids, b.ids) and a.bad == b.bad


def drawn(p, epoch):
    return Counter(p.key(int(i)) for i in p.order(epoch))


# The order ------------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_pair_once_in_a_keyed_order(tokenizer):
    p = pairs(tokenizer, Made(50), Made(30, name="other"))
    assert len(p) == p.rows == 80
    orders = [p.order(e).tolist() for e in range(3)]
    assert all(sorted(o) == list(range(80)) for o in orders)
    assert orders[0] != orders[1] != orders[2]
    assert pairs(tokenizer, Made(50), Made(30, name="other")).order(1).tolist() == orders[1]
    assert pairs(tokenizer, Made(50), Made(30, name="other"), seed=1).order(0).tolist() != orders[0]
    assert p.order(0).dtype == np.int64


def test_weights(tokenizer):
    p = pairs(tokenizer, Made(40, name="half", weight=0.5), Made(10, name="two", weight=2.0), Made(9, name="one"))
    assert len(p) == 20 + 20 + 9
    epochs = [drawn(p, e) for e in range(4)]
    for e in epochs:
        assert all(e[f"two:{i}"] == 2 for i in range(10))
        assert all(e[f"one:{i}"] == 1 for i in range(9))
    halves = [{k for k in e if k.startswith("half")} for e in epochs]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == 40
    assert len(set(p.order(0).tolist())) == len(p)  # a second showing is another draw, augmented in another way


def test_odd_weights_show_all_rows_equally_often_in_the_long_run(tokenizer):
    p = pairs(tokenizer, Made(7, weight=0.3), Made(5, name="more", weight=1.5))
    total = sum((drawn(p, e) for e in range(70)), Counter())
    assert {total[f"made:{i}"] for i in range(7)} == {70 * 2 // 7}
    assert {total[f"more:{i}"] for i in range(5)} == {70 * 8 // 5}
    for e in range(20):
        order = p.order(e).tolist()
        assert len(set(order)) == len(order) == len(p)


def test_a_million_rows_are_ordered_in_moments(tokenizer):
    p = pairs(tokenizer, Made(1_000_000))
    began = time.perf_counter()
    order = p.order(3)
    assert time.perf_counter() - began < 3
    assert len(np.unique(order)) == 1_000_000


# Samples --------------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_epoch_and_index(tokenizer):
    p = pairs(tokenizer, Made(10, captions=5))
    first, again = p[(1, 3)], pairs(tokenizer, Made(10, captions=5))[(1, 3)]
    assert torch.equal(first.images, again.images)
    assert first.texts == again.texts
    assert first.images.shape == (3, SIZE, SIZE)
    others = [p[(e, 3)] for e in range(2, 42)]
    assert len({o.images.numpy().tobytes() for o in others}) > 20
    assert len({tuple(o.texts[0]) for o in others}) == 5
    assert all(o.key == "made:3" for o in others)


def test_a_copy_sent_to_another_process_makes_the_same_samples(tokenizer, tmp_path):
    rows = [{"image": f"{i}.png", "caption": f"image {i}"} for i in range(6)]
    for i in range(6):
        Image.new("RGB", (20, 20), (i * 40, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    p = pairs(tokenizer, *open_sources([SourceConfig(str(tmp_path / "a.json"))]))
    copy = pickle.loads(pickle.dumps(p))
    for i in range(6):
        assert torch.equal(p[(2, i)].images, copy[(2, i)].images)
        assert p[(2, i)].texts == copy[(2, i)].texts


def test_bad_samples_are_replaced_in_a_fixed_way_and_named(tokenizer):
    sources = Made(20, name="good"), Made(20, bad=range(0, 20, 2))
    p, q = pairs(tokenizer, *sources), pairs(tokenizer, *sources)
    for index in range(20, 40):
        a, b = p[(0, index)], q[(0, index)]
        assert (a.key, a.bad) == (b.key, b.bad)
        assert a.key.startswith("made")  # from the same source, so that weights hold
        assert int(a.key.split(":")[1]) % 2 == 1
        if index % 2 == 0:
            assert a.bad[0] == Bad(f"made:{index - 20}", "made so")
        else:
            assert not a.bad
    assert len({p[(e, 20)].key for e in range(20)}) > 3


def test_all_bad_stops(tokenizer):
    p = pairs(tokenizer, Made(10, bad=range(10)))
    with pytest.raises(DataError, match=r"16 samples in a row are unreadable, the first: made:3: made so; made:"):
        p[(0, 3)]


def test_nothing_to_draw_from_is_refused(tokenizer):
    for sources in ([], [Made(0)]):
        with pytest.raises(DataError, match="no data"):
            draws(sources, EvalTransform(SIZE), tokenizer, config(), 0)


def test_captions_unknown_to_the_tokenizer_are_refused(tokenizer):
    class Foreign(Made):
        def __getitem__(self, row):
            return Record(
                self.key(row), super().__getitem__(row).image, ["слон и кот" if row < 40 else "words and more"]
            )

    with pytest.raises(DataError, match=r"unknown to tokenizer .*max_unknown = 1.0%"):
        pairs(tokenizer, Foreign(100))
    assert len(pairs(tokenizer, Foreign(100), max_unknown=1.0)) == 100


def test_the_fingerprint_tells_what_changes_samples(tokenizer):
    first = pairs(tokenizer).fingerprint()
    assert first == pairs(tokenizer).fingerprint()
    assert first == pairs(tokenizer, workers=2, max_bad_fraction=0.5).fingerprint()
    changed = [
        pairs(tokenizer, Made(11)),
        pairs(tokenizer, seed=1),
        pairs(tokenizer, max_words=5),
        pairs(tokenizer, flip=0.1),
        pairs(tokenizer, train=False),
    ]
    assert len({first, *(c.fingerprint() for c in changed)}) == 6


# Batches --------------------------------------------------------------------------------------------------------------


def test_batches_hold_what_is_promised(tokenizer):
    batch = next(iter(load(pairs(tokenizer, Made(30), max_tokens=9))))
    assert batch.image.shape == (4, 3, SIZE, SIZE)
    assert batch.image.dtype == torch.uint8
    assert batch.ids.shape == batch.keep.shape
    assert batch.ids.shape[1] <= 9
    assert (batch.ids[:, 0] == tokenizer.cls_id).all()
    assert len(batch.keys) == 4


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(tokenizer, workers):
    p = pairs(tokenizer, Made(30, bad=range(0, 30, 3), captions=2))
    expected = list(load(p, steps=9))
    got = list(load(p, steps=9, workers=workers))
    assert len(got) == 9
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 31])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_gets_its_share_of_one_endless_stream(tokenizer, n, world):
    p = pairs(tokenizer, Made(n), train=False)
    steps, batch = 8, 4
    loaders = [load(p, batch=batch, rank=r, world=world, steps=steps) for r in range(world)]
    per_rank = [[b.keys for b in loader] for loader in loaders]
    assert all(len(keys) == batch for rank in per_rank for keys in rank)
    stream = [k for step in zip(*per_rank, strict=True) for keys in step for k in keys]
    expected = [p.key(int(i)) for e in range(steps * world * batch // n + 1) for i in p.order(e)]
    assert stream == expected[: len(stream)]


def test_a_resumed_run_sees_what_an_unbroken_one_would_have_seen(tokenizer):
    p = pairs(tokenizer, Made(13))
    unbroken = list(load(p, steps=10))
    resumed = load(pairs(tokenizer, Made(13)), start=6, steps=10, workers=2)
    assert len(resumed) == 4
    for _ in range(2):  # and again, for a loader can be iterated more than once
        assert all(same(a, b) for a, b in zip(unbroken[6:], resumed, strict=True))
    assert list(load(p, start=10, steps=10)) == []


def test_the_training_loop_is_fed(tokenizer):
    p = pairs(tokenizer, Made(13))
    assert len(p) == 13
    got = list(p.batches(3, 2, rank=1, world=2, batch_size=4))
    assert all(same(a, b) for a, b in zip(got, list(load(p, rank=1, world=2, steps=5))[3:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_global_generators_alone(tokenizer, workers):
    import random

    p = pairs(tokenizer)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(load(p, workers=workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_wrong_arguments_are_refused(tokenizer):
    p = pairs(tokenizer)
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        load(p, rank=2, world=2)
    with pytest.raises(ValueError, match="batch_size"):
        load(p, batch=0)


# Faults in workers ----------------------------------------------------------------------------------------------------


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(threading.Lock())


def only_in_a_worker(fault):
    main = os.getpid()

    def does(row):
        if row == 7 and os.getpid() != main:
            fault()

    return does


def segfault():
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.SIGSEGV)


def stubborn():
    """Hangs, and does not hear a polite signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def raise_unpicklable():
    raise Unpicklable(1, 2)


FAULTS = {
    "SIGKILL": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        r"worker \d was killed by SIGKILL: probably out of memory",
    ),
    "SIGSEGV": (segfault, r"worker \d was killed by SIGSEGV|worker \d exited"),
    "exit": (lambda: os._exit(3), r"worker \d exited with status 3"),
    "hang": (stubborn, r"no batch for 2 s .*data\.worker_timeout"),
    "unpicklable": (raise_unpicklable, r"made:7: Unpicklable"),
    "SystemExit": (lambda: exit(4), r"made:7: SystemExit: 4"),
    "MemoryError": (lambda: bytearray(1 << 60), r"made:7: MemoryError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_fails_stops_the_run_with_one_clear_error(tokenizer, fault):
    does, message = FAULTS[fault]
    p = pairs(tokenizer, Made(64, does=only_in_a_worker(does)))
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        for _ in load(p, steps=20, workers=2, worker_timeout=2.0):
            pass
    assert time.monotonic() - began < 7
    assert "made:7" in str(caught.value)
    assert "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(caught.value))


def test_what_a_transform_cannot_do_is_one_bad_sample(tokenizer):
    class Breaking(EvalTransform):
        def __call__(self, image, *key, sided=False):
            if image.getpixel((0, 23)) == (3, 3, 3):
                raise MemoryError
            return super().__call__(image)

    p = draws([Made(10)], Breaking(SIZE), tokenizer, config(), 0)
    batches = list(load(p, steps=5))
    assert {(bad.key, bad.reason) for b in batches for bad in b.bad} == {("made:3", "too little memory to decode it")}
    assert all(len(b.keys) == 4 and "made:3" not in b.keys for b in batches)


def busy():
    while True:
        pass


def test_a_decoder_that_computes_for_ever_is_named_by_its_cpu_time(tokenizer, monkeypatch):
    monkeypatch.setattr(loader, "_STUCK", 1.0)
    p = pairs(tokenizer, Made(64, does=only_in_a_worker(busy)))
    with pytest.raises(StuckSample, match=r"stuck at made:7: .* 1 s of CPU time") as caught:
        list(load(p, steps=20, workers=2, worker_timeout=100.0))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.key, again.reason) == ("made:7", "decoding took more than 1 s of CPU time")


def test_a_worker_that_waits_for_its_turn_is_waited_for(tokenizer, monkeypatch, caplog):
    """As on an overloaded machine, where it is nobody's fault that nothing comes."""
    monkeypatch.setattr(loader._Watch, "computing", lambda self: True)
    p = pairs(tokenizer, Made(64, does=only_in_a_worker(lambda: time.sleep(3))))
    assert len(list(load(p, steps=16, workers=1, worker_timeout=1.0))) == 16
    assert "the machine is overloaded" in caplog.text


def test_work_and_waiting_for_storage_are_told_apart():
    import multiprocessing

    for does, expected in ((busy, True), (stubborn, False)):
        process = multiprocessing.get_context("fork").Process(target=does, daemon=True)
        process.start()
        time.sleep(0.2)
        watch = loader._Watch([process])
        assert watch.computing() is expected
        assert (watch.used() > 0) is expected
        process.kill()
        process.join()


def test_what_was_left_out_is_replaced_unread(tokenizer):
    def does(row):
        assert row != 3

    p = pairs(tokenizer, Made(10))
    before = [key for batch in load(p, steps=5) for key in batch.keys]
    p = pairs(tokenizer, Made(10))
    p.leave_out(frozenset({"made:3"}))
    p.sources[0].does = does
    batches = list(p.batches(0, 5, rank=0, world=1, batch_size=4))
    after = [key for batch in batches for key in batch.keys]
    assert "made:3" in before
    assert "made:3" not in after
    assert [b for a, b in zip(before, after, strict=True) if a != "made:3"] == [k for k in before if k != "made:3"]
    assert {bad.key for batch in batches for bad in batch.bad} == {"made:3"}


def full(self):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")


def test_a_full_dev_shm_is_said_at_once_with_the_cure(tokenizer, monkeypatch):
    p, began = pairs(tokenizer), time.monotonic()
    ours = loader._handed_over

    def hand_over(batch):
        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
        return ours(batch)

    monkeypatch.setattr(loader, "_handed_over", hand_over)
    with pytest.raises(DataError, match=r"hand over a batch .*No space left.*/dev/shm.*--shm-size.*data\.workers"):
        list(load(p, steps=4, workers=1))
    assert time.monotonic() - began < 10


def test_a_dev_shm_too_small_for_what_may_be_on_its_way_is_said_at_the_start(tokenizer, monkeypatch):
    p = pairs(tokenizer)
    size = loader._bytes(next(iter(load(p))))  # 5 batches: two for each of two workers, and the one in use
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 5 * size - 1)
    with pytest.raises(DataError, match=rf"/dev/shm is too small: 5 batches of {size:,} bytes"):
        list(load(p, steps=9, workers=2))
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 5 * size + 5000)  # texts differ in length
    assert len(list(load(p, steps=9, workers=2))) == 9
    monkeypatch.setattr(loader, "_free_shared_memory", lambda: 0)
    assert len(list(load(p, steps=3, workers=0))) == 3


def test_a_read_only_dev_shm_is_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match=r"cannot keep .*/dev/shm"):
        load(pairs(tokenizer), workers=1)
    assert len(list(load(pairs(tokenizer), steps=2, workers=0))) == 2


def test_a_worker_that_dies_between_steps_does_not_break_the_step(tokenizer):
    p = pairs(tokenizer, Made(64, does=only_in_a_worker(lambda: os._exit(3))))
    iterator = iter(load(p, steps=40, workers=2))
    next(iterator)
    time.sleep(2)  # the training step during which a worker dies
    with pytest.raises(DataError, match="status 3"):
        list(iterator)


def test_without_workers_errors_are_the_same(tokenizer):
    def does(row):
        if row == 7 and armed:
            raise Unpicklable(1, 2)

    armed = []
    p = pairs(tokenizer, Made(10, does=does))
    armed.append(1)
    with pytest.raises(DataError, match="made:7: Unpicklable"):
        list(load(p, steps=6))


def test_a_stop_signal_to_the_whole_group_leaves_the_workers_to_the_loop(tokenizer):
    main = os.getpid()

    def does(row):
        if row == 7 and os.getpid() != main:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)

    p = pairs(tokenizer, Made(16, does=does))
    assert len(list(load(p, steps=8, workers=2))) == 8


def test_leaving_early_leaves_no_worker_behind(tokenizer):
    import multiprocessing

    iterator = iter(load(pairs(tokenizer), steps=1000, workers=2))
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    began = time.monotonic()
    iterator.close()
    assert time.monotonic() - began < 3, "it waited for batches that nobody wants"
    assert not multiprocessing.active_children()


# The ledger -----------------------------------------------------------------------------------------------------------


def test_all_processes_leave_out_what_one_of_them_was_stuck_at(tmp_path):
    ledger = Ledger(tmp_path / "bad_samples-1.jsonl")
    ledger.add([Bad("torn", "cut off")], 3)
    ledger.leave_out("slow", "took too long")
    assert ledger.left_out == Ledger(tmp_path / "bad_samples-0.jsonl").left_out == {"slow"}
    again = Ledger(tmp_path / "bad_samples-1.jsonl")
    assert again.left_out == {"slow"}
    assert len(again) == 2
    assert len(Ledger(tmp_path / "bad_samples-0.jsonl")) == 0


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("k", [0, 1, 37, 200])
def test_the_ledger_counts_exactly(tokenizer, tmp_path, k):
    bad = np.random.default_rng(k).permutation(1000)[:k].tolist()
    p = pairs(tokenizer, Made(1000, bad=bad), train=False)
    ledger, seen = Ledger(tmp_path / "run" / "bad_samples.jsonl", max_bad_fraction=0.5), 0
    for batch in load(p, batch=50, steps=20):
        seen += len(batch)
        ledger.add(batch.bad, seen)
    assert len(ledger) == k
    entries = written(tmp_path / "run" / "bad_samples.jsonl")
    assert {e["key"] for e in entries} == {f"made:{i}" for i in bad}
    assert len(entries) == k
    assert all(e["reason"] == "made so" for e in entries)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_ledger_on_a_full_disk_is_named(tmp_path):
    ledger = Ledger(tmp_path / "bad.jsonl")
    ledger.path.symlink_to("/dev/full")
    with pytest.raises(files.WriteError, match=r"could not write .*bad\.jsonl: needs about \d+ bytes, .* are free"):
        ledger.add([Bad("made:1", "made so")], 1)


@pytest.mark.parametrize(("k", "stops"), [(37, False), (200, True)])
def test_too_many_bad_samples_stop_the_run(tokenizer, tmp_path, k, stops):
    p = pairs(tokenizer, Made(1000, bad=range(0, 1000, 1000 // k)), train=False)
    ledger, seen = Ledger(tmp_path / "bad.jsonl", p.prepare.config.max_bad_fraction), 0

    def run():
        nonlocal seen
        for batch in load(p, batch=50, steps=20):
            seen += len(batch)
            ledger.add(batch.bad, seen)

    if stops:
        with pytest.raises(TooManyBad, match=r"\d+ of \d+ .*%\) .*data\.max_bad_fraction = 5\.0%; .*made:\d+: made so"):
            run()
        assert 150 <= seen <= 300  # not after one unlucky batch, not after the epoch
    else:
        run()


def test_the_ledger_of_a_killed_run_is_continued(tmp_path):
    path = tmp_path / "bad.jsonl"
    ledger = Ledger(path)
    ledger.add([Bad("a", "x"), Bad("a", "x"), Bad("b\n\u2028", "y")], 500)
    with path.open("a") as file:
        file.write('{"key": "tor')
    again = Ledger(path)
    assert len(again) == 2
    again.add([Bad("b\n\u2028", "y"), Bad("c", "z")], 500)
    assert "c" in again
    assert len(Ledger(path)) == 3
    lines = path.read_text().split("\n")
    assert [json.loads(line)["key"] for line in (lines[0], lines[1], lines[3])] == ["a", "b\n\u2028", "c"]


# The whole ------------------------------------------------------------------------------------------------------------


def test_real_photographs_and_emoji(real_data):
    sources = open_sources(
        [
            SourceConfig(str(real_data / "photos" / "photos.json"), caption_column="captions"),
            SourceConfig(
                str(real_data / "emoji" / "names.json"), image_column="file", caption_column="name", weight=0.1
            ),
        ]
    )
    c = config(workers=2)
    tokenizer = Tokenizer.load(real_data / "bert_vocab" / "vocab.txt")
    p = draws(sources, TrainTransform(64, c), tokenizer, c, 0)
    assert len(p) == 236 + 353
    batches = list(p.batches(0, 5, rank=0, world=1, batch_size=28))
    assert all("no caption" in one.reason for b in batches for one in b.bad)  # of 29 photographs
    texts = [t for b in batches for t in tokenizer.decode(b.ids)]
    assert all(texts)
    assert torch.isfinite(torch.cat([b.image for b in batches])).all()
