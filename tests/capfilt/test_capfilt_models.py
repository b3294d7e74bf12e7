"""The real scorer against the same computed image by image and text by text; and the job with a tiny model, whole."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import transformers
from capfilt_crawl import HERE, annotations, check_complete, crawl
from PIL import Image

from blip import dist
from blip.checkpoints.checkpoint import save_pretrained
from blip.checkpoints.layouts import transformers_captioning, transformers_matching
from blip.checkpoints.table import to_theirs
from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from blip.data.transforms import EvalTransform
from blip.inference.generate import generate_texts
from blip.inference.settings import DECODE_PRESETS
from blip.models.blip import Blip
from blip.models.presets import TINY
from blip.text import clean_caption
from blip.tokenizer import Tokenizer
from blip.world import files
from capfilt.__main__ import main
from capfilt.run import Run
from capfilt.score.loop import score
from capfilt.score.models import BlipScorer, same_vision
from capfilt.score.scorer import BatchTooLarge, Item
from capfilt.settings import ScoreConfig, decode_record


def tiny(seed, image_size=32):
    tokenizer = Tokenizer.load("world")
    vision = dataclasses.replace(TINY.vision, image_size=image_size, depth=2, width=64, heads=2)
    text = tokenizer.text_config(dataclasses.replace(TINY.text, width=64, hidden=128, init_std=0.3))
    torch.manual_seed(seed)
    return Blip(dataclasses.replace(TINY, vision=vision, text=text, embed_dim=32)).eval(), tokenizer


@pytest.fixture(scope="module")
def models():
    return tiny(0), tiny(1)


def photos(n=6, side=50):
    dice = np.random.default_rng(0)
    return [Image.fromarray(dice.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(n)]


TEXTS = [
    ["a red star"],
    [],
    ["a small blue ring above a green cross"],
    ["one", "a large moon", "yellow " * 40],
    ["x"],
    ["y z"],
]


def items(sides):
    small = [[np.asarray(p.resize((s, s), Image.Resampling.BICUBIC)) for s in sides] for p in photos()]
    return [Item(f"{i:032x}", pixels, texts) for i, (pixels, texts) in enumerate(zip(small, TEXTS, strict=True))]


@torch.no_grad()
def one_by_one(captioner, filter, config, photo, texts, key):
    """The straightforward way: nothing shared, nothing batched."""
    decode = dataclasses.replace(DECODE_PRESETS[config.decode], num=config.captions, seed=config.seed)
    model, tokenizer = captioner
    image = EvalTransform(model.vision.image_size)(photo)[None]
    captions = generate_texts(model, tokenizer, image, decode, prompt="a picture of", keys=[key])[0]
    model, tokenizer = filter
    image = EvalTransform(model.vision.image_size)(photo)[None]
    scores = []
    for text in [*texts, *(clean_caption(t.text, 30) if t.text.strip() else "" for t in captions)]:
        ids, keep = tokenizer.encode([text], first=config.itm_token, max_length=config.max_tokens)
        logits = model.match(ids, keep, model.context(model.vision(image)))
        ids, keep = tokenizer.encode([text], first="cls", max_length=config.max_tokens)
        cosine = (model.embed_text(ids, keep) * model.embed_image(model.vision(image))).sum()
        scores.append((float(torch.softmax(logits, 1)[0, 1]), float(logits[0, 1] - logits[0, 0]), float(cosine)))
    return captions, scores


@pytest.mark.parametrize("token", ["enc", "cls"])
@pytest.mark.parametrize("decode", ["capfilt_2022", "greedy"])
def test_equal_to_one_by_one(models, token, decode):
    captioner, filter = models
    config = ScoreConfig(filter="f", decode=decode, captions=2 if decode == "capfilt_2022" else 1, itm_token=token)
    scorer = BlipScorer(captioner, filter, config)
    assert not scorer.shared
    for item, photo, scores in zip(items(scorer.sides), photos(), scorer.score(items(scorer.sides)), strict=True):
        captions, match_scores = one_by_one(captioner, filter, config, photo, item.texts, item.sample_id)
        assert [t.text for t in scores.syn] == [t.text for t in captions]
        assert [t.finished for t in scores.syn] == [t.finished for t in captions]
        assert [t.logprob for t in scores.syn] == pytest.approx([t.logprob for t in captions], abs=1e-4)
        matched = [*scores.web, *(t.match for t in scores.syn)]
        assert len(matched) == len(match_scores) > 0
        for got, (probability, margin, cosine) in zip(matched, match_scores, strict=True):
            assert got.margin == pytest.approx(margin, abs=1e-4)
            assert got.probability == pytest.approx(probability, abs=1e-5)
            assert got.itc == pytest.approx(cosine, abs=1e-5)
    assert [m.truncated for m in scorer.score(items(scorer.sides))[3].web] == [False, False, True]


def test_texts_get_the_length_that_is_asked_for(models):
    scorers = [
        BlipScorer(*models, ScoreConfig(filter="f", decode="greedy", max_length=length)) for length in (None, 9, 30)
    ]
    assert [scorer.decode.max_length for scorer in scorers] == [20, 9, 30]
    short, long = ([scores.syn[0] for scores in scorer.score(items(scorer.sides))] for scorer in scorers[1:])
    for some, more in zip(short, long, strict=True):
        assert more.text.startswith(some.text)
        assert some.finished or len(more.text) > len(some.text)
    with pytest.raises(ValueError, match="max_length 65: the model has 64 positions"):
        BlipScorer(*models, ScoreConfig(filter="f", max_length=65))
    with pytest.raises(ValueError, match="max_tokens 65: the model has 64 positions"):
        BlipScorer(*models, ScoreConfig(filter="f", max_tokens=65))


def test_the_first_token_matters(models):
    captioner, filter = models
    with_enc, with_cls = (
        BlipScorer(captioner, filter, ScoreConfig(filter="f", itm_token=token)).score(items((32,))[:1])[0].web[0].margin
        for token in ("enc", "cls")
    )
    assert abs(with_enc - with_cls) > 1e-3


def test_nothing_depends_on_the_batch(models):
    """Fault 21: batches of 1, of all, and in another order."""
    scorer = BlipScorer(*models, ScoreConfig(filter="f", captions=2))
    one = [scorer.score([item])[0] for item in items(scorer.sides)]
    many = scorer.score(items(scorer.sides))
    other = scorer.score(items(scorer.sides)[::-1])[::-1]
    for a, b, c in zip(one, many, other, strict=True):
        assert [t.text for t in a.syn] == [t.text for t in b.syn] == [t.text for t in c.syn]
        assert [m.margin for m in a.web] == pytest.approx([m.margin for m in b.web], abs=1e-5)
        assert [m.margin for m in b.web] == pytest.approx([m.margin for m in c.web], abs=1e-5)
    assert len({t.text for s in many for t in s.syn}) > 3


def test_a_row_with_many_texts_costs_what_they_cost_and_changes_no_other(models, monkeypatch):
    """Memory is bounded by texts: without grouping, each image would be matched with a hundred."""
    scorer = BlipScorer(*models, ScoreConfig(filter="f"))
    rows = items(scorer.sides)
    rows[4].texts = [f"a star and {i} more" for i in range(100)]
    alone = [scorer.score([row])[0] for row in rows]
    sizes = []
    match = scorer.filter.match
    monkeypatch.setattr(scorer.filter, "match", lambda ids, *rest: sizes.append(len(ids)) or match(ids, *rest))
    together = scorer.score(rows)
    assert sum(sizes) == sum(map(len, TEXTS)) - 1 + 100 + 6  # no padding: each text once
    assert max(sizes) <= 8 * len(rows)
    for a, b in zip(alone, together, strict=True):
        assert [t.text for t in a.syn] == [t.text for t in b.syn]
        matched = zip([*a.web, *(t.match for t in a.syn)], [*b.web, *(t.match for t in b.syn)], strict=True)
        for one, other in matched:
            assert one.margin == pytest.approx(other.margin, abs=1e-5)
            assert one.itc == pytest.approx(other.itc, abs=1e-6)
            assert one.tokens == other.tokens


def test_equal_towers_are_one(models):
    captioner, filter = models
    twin = tiny(2)
    twin[0].vision.load_state_dict(filter[0].vision.state_dict())
    assert same_vision(twin[0], filter[0])
    assert not same_vision(captioner[0], filter[0])
    seen = []
    filter[0].vision.register_forward_pre_hook(lambda *_: seen.append(1))
    apart = BlipScorer(twin, filter, ScoreConfig(filter="f"))
    assert apart.shared
    expected = apart.score(items(apart.sides))
    assert len(seen) == 1
    apart.shared = False  # what it would have been, seeing twice
    again = apart.score(items(apart.sides))
    assert [[t.text for t in s.syn] for s in again] == [[t.text for t in s.syn] for s in expected]


def test_towers_of_two_sizes(models):
    scorer = BlipScorer(tiny(3, 48), models[1], ScoreConfig(filter="f"))
    assert scorer.sides == (48, 32)
    captions, match_scores = one_by_one(tiny(3, 48), models[1], scorer.config, photos()[0], TEXTS[0], f"{0:032x}")
    scores = scorer.score(items(scorer.sides)[:1])[0]
    assert scores.syn[0].text == captions[0].text
    assert scores.web[0].margin == pytest.approx(match_scores[0][1], abs=1e-4)


def test_a_filter_alone_writes_nothing(models):
    scores = BlipScorer(None, models[1], ScoreConfig(filter="f")).score(items((32,)))
    assert [len(s.syn) for s in scores] == [0] * 6
    assert [len(s.web) for s in scores] == [len(t) for t in TEXTS]


FULL = [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9000000000 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_out_of_memory_is_said_so_that_the_job_can_halve(models, monkeypatch, error):
    scorer = BlipScorer(None, models[1], ScoreConfig(filter="f"))

    def full(*_):
        raise error

    monkeypatch.setattr(scorer, "_match", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(BatchTooLarge):
        scorer.score(items(scorer.sides))
    monkeypatch.setattr(scorer, "_match", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scorer.score(items(scorer.sides))


class Beside:
    """A GPU's second stream, as far as a CPU can pretend: work is done when it is launched."""

    def __init__(self):
        self.taken = 0

    def launch(self, action):
        tensors = action()

        def result():
            self.taken += 1
            return tensors

        return result


@pytest.mark.parametrize("sizes", [(32, 32), (32, 48)])
def test_what_was_begun_is_used_and_changes_no_score(monkeypatch, sizes):
    pair = [tiny(seed, size) for seed, size in enumerate(sizes)]
    scorer = BlipScorer(*pair, ScoreConfig(filter="f", captioner="c"))
    rows = items(scorer.sides)
    wanted = [scorer.score(rows[:3]), scorer.score(rows[3:])]
    scorer.ahead(rows)  # there is nothing beside a CPU
    assert not scorer._begun
    encoded, encode = [], scorer._encode
    monkeypatch.setattr(scorer, "_encode", lambda some: encoded.append(len(some)) or encode(some))
    scorer._beside = Beside()
    scorer.ahead(rows[3:])
    assert [scorer.score(rows[:3]), scorer.score(rows[3:])] == wanted
    assert (encoded, scorer._beside.taken, scorer._begun) == ([3, 3], 1, {})
    for row in rows[:4]:  # of batches that were halved, or of parts that failed
        scorer.ahead([row])
    assert len(scorer._begun) == 2


def test_two_towers_of_one_size_share_the_pixels_on_the_device(models, monkeypatch):
    scorer = BlipScorer(*models, ScoreConfig(filter="f", captioner="c"))
    assert not scorer.shared
    copied, images = [], scorer._images
    monkeypatch.setattr(scorer, "_images", lambda *args: copied.append(1) or images(*args))
    scorer.score(items(scorer.sides))
    assert len(copied) == 1


def test_looking_ahead_ends_where_memory_is_too_small_for_it(models, monkeypatch):
    """A batch that fits alone is not halved because of the one after it."""
    scorer = BlipScorer(*models, ScoreConfig(filter="f", captioner="c"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows, match = items(scorer.sides), scorer._match

    def crowded(*args):
        if scorer._begun:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return match(*args)

    wanted = scorer.score(rows[:3])
    monkeypatch.setattr(scorer, "_match", crowded)
    scorer._beside = Beside()
    scorer.ahead(rows[3:])
    assert scorer.score(rows[:3]) == wanted
    assert (scorer._beside, scorer._begun) == (None, {})

    def full(action):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    scorer._beside = Beside()
    scorer._beside.launch = full
    scorer.ahead(rows[3:])
    assert scorer._beside is None


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs with bfloat16, as far as a machine without any can pretend; what is made the current one."""
    chosen = []
    for name in dist.LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    return chosen


@pytest.mark.parametrize(
    ("environment", "option", "device"),
    [
        ({}, None, "cuda:0"),
        ({"LOCAL_RANK": "3"}, None, "cuda:3"),
        ({"LOCAL_RANK": "3"}, "cuda", "cuda:3"),
        ({"LOCAL_RANK": "3"}, "cuda:1", "cuda:1"),
        ({"LOCAL_RANK": "3"}, "cpu", "cpu"),
        ({"SLURM_LOCALID": "2"}, None, "cuda:2"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, None, "cuda:1"),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, None, "cuda:1"),  # torchrun in a step of SLURM
        ({"LOCAL_RANK": "6"}, None, "cuda:2"),  # two processes a GPU
        ({"LOCAL_RANK": "3", "ACCELERATE_USE_CPU": "true"}, None, "cpu"),
    ],
)
def test_each_process_of_a_launcher_takes_its_own_gpu(models, gpus, monkeypatch, environment, option, device):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = []
    monkeypatch.setattr(BlipScorer, "__init__", lambda self, *_: made.append(_[-1]) or setattr(self, "facts", {}))
    monkeypatch.setattr("capfilt.score.models.checkpoint.from_pretrained", lambda *_, **__: (None, None))
    monkeypatch.setattr("capfilt.score.models.checkpoint.trained_on", lambda where: ())
    monkeypatch.setattr("capfilt.score.models.resolve", lambda config: {"captioner": None, "filter": "x"})
    BlipScorer.load(ScoreConfig(filter="x"), option)
    assert made == [device]
    assert gpus == [device] * (device != "cpu")


def test_one_gpu_that_a_process_sees_is_its_own(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # CUDA_VISIBLE_DEVICES, one a process
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert str(dist.own_device()) == "cuda:0"


def test_the_number_format_is_decided_once_when_the_job_is_planned(models, tmp_path, gpus, monkeypatch, capsys):
    save_pretrained(*models[1], tmp_path / "filter")
    plan = ["plan", "--input", str(crawl(tmp_path / "in", shards=1, rows=4)), "--filter", str(tmp_path / "filter")]
    assert main([*plan, "--out", str(tmp_path / "gpu")]) == 0
    assert "computes in bfloat16" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert main([*plan, "--out", str(tmp_path / "old")]) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*plan, "--out", str(tmp_path / "cpu")]) == 0
    assert "computes in float32; on a GPU, --precision bfloat16" in capsys.readouterr().out
    formats = {name: Run.open(str(tmp_path / name)).config.precision for name in ("gpu", "old", "cpu")}
    assert formats == {"gpu": "bfloat16", "old": "float32", "cpu": "float32"}
    # What was planned stays, on whatever machine it is continued, unless somebody asks for another format.
    assert main([*plan, "--out", str(tmp_path / "gpu")]) == 0
    assert main([*plan, "--out", str(tmp_path / "gpu"), "--precision", "auto"]) == 0
    assert main([*plan, "--out", str(tmp_path / "gpu"), "--precision", "float32"]) == 2
    assert "precision: bfloat16 -> float32" in capsys.readouterr().err
    for name in ("cpu", "gpu"):
        assert main(["score", str(tmp_path / name), "--precision", "auto", "--decode-workers", "0"]) == 0
        rows = annotations(str(tmp_path / name)).to_pylist()
        assert {row["dtype"] for row in rows} == {formats[name]}
    alone = BlipScorer(None, models[1], ScoreConfig(filter="f")).filter
    assert next(alone.parameters()).dtype == torch.float32


# transformers ---------------------------------------------------------------------------------------------------------


def theirs(kind, table, model):
    """transformers' model of a kind with our weights."""
    text, vision = model.config.text, model.config.vision
    words = {
        "vocab_size": text.vocab_size, "hidden_size": text.width, "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads, "intermediate_size": text.hidden, "layer_norm_eps": text.norm_eps,
        "max_position_embeddings": text.max_positions, "encoder_hidden_size": vision.width, "pad_token_id": text.pad_id,
        "bos_token_id": text.dec_id, "eos_token_id": text.sep_id, "sep_token_id": text.sep_id,
    }  # fmt: skip
    photos = {
        "image_size": vision.image_size, "patch_size": vision.patch_size, "hidden_size": vision.width,
        "num_hidden_layers": vision.depth, "num_attention_heads": vision.heads, "intermediate_size": 4 * vision.width,
        "layer_norm_eps": 1e-6, "initializer_range": 0.02,
    }  # fmt: skip
    config = transformers.BlipConfig(
        text_config=words, vision_config=photos, image_text_hidden_size=model.config.embed_dim
    )
    other = kind(config).eval()
    other.load_state_dict(to_theirs(table(model), model.state_dict()), strict=True)
    return other


@torch.no_grad()
def test_equal_to_transformers(models):
    """Fault 26, on random weights: the same greedy captions of 20 images, logits of ITM and cosines to 1e-4."""
    (captioner, words), (filter, _) = models
    writer = theirs(transformers.BlipForConditionalGeneration, transformers_captioning, captioner)
    matcher = theirs(transformers.BlipForImageTextRetrieval, transformers_matching, filter)
    shown = photos(20)
    texts = [TEXTS[i % 4] or ["a large blue moon at the top"] for i in range(20)]
    # transformers puts no [ENC] first.
    scorer = BlipScorer(*models, ScoreConfig(filter="f", decode="greedy", itm_token="cls"))
    pixels = [[np.asarray(p.resize((32, 32), Image.Resampling.BICUBIC))] for p in shown]
    scores = scorer.score([Item(f"{i:032x}", p, t) for i, (p, t) in enumerate(zip(pixels, texts, strict=True))])
    images = torch.stack([EvalTransform(32)(p) for p in shown])
    prompt, _ = words.encode(["a picture of"] * 20, first="dec", max_length=20)  # generate drops the last, [SEP]
    written = writer.generate(images, prompt, num_beams=1, do_sample=False, max_length=20, min_length=5)
    captions = words.decode(written[:, prompt.shape[1] - 1 :])
    assert [s.syn[0].text for s in scores] == captions
    assert len(set(captions)) > 10
    for image, some, image_scores, own in zip(images, texts, scores, captions, strict=True):
        for text, got in [
            *zip(some, image_scores.web, strict=True),
            (clean_caption(own, 30), image_scores.syn[0].match),
        ]:
            ids, keep = words.encode([text], first="cls", max_length=35)
            inputs = {"input_ids": ids, "pixel_values": image[None], "attention_mask": keep.long()}
            logits = matcher(**inputs).itm_score[0]
            assert got.margin == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
            assert got.itc == pytest.approx(float(matcher(**inputs, use_itm_head=False).itm_score[0, 0]), abs=1e-4)


# The job --------------------------------------------------------------------------------------------------------------


def test_the_whole_job_on_the_image_world(models, tmp_path, capsys):
    files.write(tmp_path / "crawl", "tar", count=40, size=32, web=True, broken=3, shard=20)
    for name, (model, tokenizer) in zip(("captioner", "filter"), models, strict=True):
        save_pretrained(model, tokenizer, tmp_path / name)
    args = ["--input", str(tmp_path / "crawl"), "--captioner", str(tmp_path / "captioner"), "--filter",
            str(tmp_path / "filter"), "--part-size", "8", "--decode-workers", "0", "--device", "cpu"]  # fmt: skip
    out, to = tmp_path / "run", tmp_path / "out"
    assert main(["run", *args, "--out", str(out), "--to", str(to), "--itm", "0.3"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    run = Run.open(str(out))
    rows = annotations(run).to_pylist()
    assert [r["status"] for r in rows].count("ok") == 37
    source = open_source(SourceConfig(str(to / "*.tar")))
    assert len(source) == json.loads((to / "_SUCCESS").read_bytes())["pairs"] > 0
    table = run.parts.read(run.plan[0].pid)
    assert table["device"].to_pylist()[0] == "cpu"
    # Again in other batches, in two shares: the same.
    assert main(["plan", *args[:-4], "--out", str(tmp_path / "again")]) == 0
    again = Run.open(str(tmp_path / "again"))
    loaded = BlipScorer.load(again.config, "cpu")
    for rank in range(2):
        options = dataclasses.replace(HERE, rank=rank, world=2, batch=3)
        assert score(again, lambda _: loaded, options, io.StringIO()) == 0
    assert annotations(again)["syn_text"].equals(annotations(run)["syn_text"])
    # A model that changed on disk is another model.
    save_pretrained(*tiny(9), tmp_path / "filter")
    assert main(["score", str(out)]) == 2
    assert "filter.sha256" in capsys.readouterr().err


def test_models_that_are_none_are_said_before_anything_is_written(models, tmp_path, capsys):
    """Of a folder that holds something else, and of a model for another task, under either role."""
    folder = crawl(tmp_path / "in", shards=1, rows=2)
    good, wrong = tmp_path / "good", tmp_path / "wrong"
    for path in (good, wrong):
        save_pretrained(*models[1], path)
    plan = ["plan", "--input", str(folder), "--out", str(tmp_path / "run")]
    config = json.loads((wrong / "config.json").read_text())
    for change, message in (
        ({"task": "vqa"}, "is of a Vqa model"),
        ({"task": "poetry"}, "update openblip"),
        ({"format": "other"}, "is it another model's?"),
        ({"model_type": "blip", "format": None}, "give the folder, with its config.json"),
    ):
        (wrong / "config.json").write_text(json.dumps(config | change))
        for models in (["--filter", str(wrong)], ["--filter", str(good), "--captioner", str(wrong)]):
            assert main([*plan, *models]) == 2, change
            error = capsys.readouterr().err
            assert error.startswith("error: ")
            assert error.count("\n") == 1
            assert message in error
            assert str(wrong) in error
    (wrong / "model.safetensors").unlink()
    assert main([*plan, "--filter", str(wrong)]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_real_run_is_that_of_an_unbroken_one(models, tmp_path):
    from capfilt_crawl import Starter

    files.write(tmp_path / "crawl", "tar", count=24, size=32, web=True)
    save_pretrained(*models[1], tmp_path / "filter")
    args = ["--input", str(tmp_path / "crawl"), "--filter", str(tmp_path / "filter"), "--part-size", "4"]
    for name in ("base", "run"):
        assert main(["plan", *args, "--out", str(tmp_path / name)]) == 0
    assert main(["score", str(tmp_path / "base"), "--decode-workers", "0", "--device", "cpu"]) == 0
    starter = Starter(tmp_path / "log")
    fault = {"CAPFILT_FAULT": "commit.after_tmp:3"}
    command = ["score", str(tmp_path / "run"), "--decode-workers", "0", "--device", "cpu"]
    assert starter.run(*command, **fault) == -9
    starter.close()
    assert main(command) == 0
    check_complete(str(tmp_path / "run"), Run.open(str(tmp_path / "base")))


def test_a_plan_says_the_length_rule_only_where_it_is_not_generated():
    """Else a job that was planned before there was a choice would not go on."""
    before = {
        "method", "beams", "num", "max_length", "min_length", "length_penalty", "repetition_penalty", "top_p", "top_k",
        "temperature", "seed",
    }  # fmt: skip
    for preset in ("capfilt_2022", "nucleus", "greedy"):
        assert set(decode_record(ScoreConfig(filter="f", decode=preset))) == before
    record = decode_record(ScoreConfig(filter="f", decode="caption_2022"))
    assert record["length_rule"] == "2022"
    assert set(record) == before | {"length_rule"}
