"""`python -m benchmarks.gpu` at a tiny size on the CPU: every part gives its figures, and none stops the others."""

import json
import time

import pytest
import torch

from benchmarks import gpu

BENCH = gpu.Bench(torch.device("cpu"), gpu.NARROW)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_runs(part):
    results = list(gpu.run(part, BENCH))
    assert [result for result in results if "failed" in result] == []
    for result in results:
        speeds = [value for name, value in result.items() if name.endswith("_per_second")]
        assert all(value > 0 for value in speeds)
        shares = [value for name, value in result.items() if "share" in name or name == "data_wait"]
        assert all(0 <= value <= 1.5 for value in shares)  # seconds of two calls, which need not be the same
    assert len(results) == {
        "marks": 2, "pretrain": 3, "pretrain_compiled": 0, "pretrain_large": 1, "loader": 1, "captions": 4,
        "reranking": 2, "capfilt": 1, "agreement": 2,
    }[part]  # fmt: skip


def test_the_cpu_agrees_with_itself():
    losses, captions = gpu.run("agreement", BENCH)
    assert losses.keys() >= {"itc", "itm", "lm", "image_tokens"}
    assert losses["agrees"]
    assert captions["equal_float32"] == 1


def test_a_difference_from_the_cpu_is_noticed(monkeypatch):
    """The second device's words are moved by a hundredth."""
    move = gpu.Pretrain.to

    def to(objective, device):
        if objective.__dict__.setdefault("moves", []):
            with torch.no_grad():
                objective.model.med.word.weight.mul_(1.01)
        objective.moves.append(device)
        return move(objective, device)

    monkeypatch.setattr(gpu.Pretrain, "to", to)
    losses, _ = gpu.run("agreement", BENCH._replace(device=torch.device("cpu", 0)))
    assert losses["lm"] > 1e-4
    assert losses["image_tokens"] == 0
    assert not losses["agrees"]


def slow(bench):
    yield "first", lambda: {"seconds": 1.0}
    yield "second", lambda: time.sleep(60)


def full(bench):
    def fail():
        raise MemoryError

    yield "too large", fail
    yield "small", lambda: {"seconds": 2.0}


def marks(bench):
    yield "product", lambda: {"tflops": 4.0}
    yield "step", lambda: {"tflops": 1.0}


def test_a_part_that_takes_too_long_or_too_much_memory_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    parts = {"marks": gpu.Part(marks, 30), "slow": gpu.Part(slow, 2), "full": gpu.Part(full, 30)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "START", "fork")
    out = tmp_path / "bench" / "gpu.json"
    results = gpu.measure(list(parts), "cpu", gpu.NARROW, out)
    assert results == [
        {"part": "marks", "case": "product", "tflops": 4.0, "mfu": 1.0},
        {"part": "marks", "case": "step", "tflops": 1.0, "mfu": 0.25},
        {"part": "slow", "case": "first", "seconds": 1.0},
        {"part": "slow", "failed": "stopped after 2 s"},
        {"part": "full", "case": "too large", "failed": "out of memory"},
        {"part": "full", "case": "small", "seconds": 2.0},
    ]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:-1] == results
    assert lines[-1] == json.loads(out.read_text())
    assert lines[-1]["results"] == results


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        gpu.main([])


def test_the_parts_take_at_most_eight_minutes():
    assert sum(part.limit for part in gpu.PARTS.values()) <= 8 * 60
