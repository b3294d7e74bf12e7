"""Collectives: two real processes against the same sums in one, and one process on its own."""

import os

import pytest
import torch
from stub_run import the_zygote

from blip import dist


@pytest.fixture
def zygote():
    return the_zygote()


def rows(rank: int, shape=(3, 2)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank))


def loss_of(rank: int, gathered: torch.Tensor) -> torch.Tensor:
    """A loss that is different in each process."""
    return (gathered * (rank + 2)).sin().sum() * (rank + 1)


def two_processes() -> None:
    assert dist.rank() == 0
    assert dist.world() == 1, "nobody has joined yet"
    dist.start(60)
    dist.start(60)
    rank = dist.rank()
    assert dist.world() == 2
    assert dist.is_main() == (rank == 0)
    expected = torch.cat([rows(0), rows(1)])

    own = rows(rank).requires_grad_()
    plain = dist.gather(own.t().contiguous().t())
    assert torch.equal(plain, expected)
    assert not plain.requires_grad
    gathered = dist.gather_with_gradient(own)
    assert torch.equal(gathered, expected)
    loss_of(rank, gathered).backward()
    whole = expected.clone().requires_grad_()
    (loss_of(0, whole) + loss_of(1, whole)).backward()
    torch.testing.assert_close(own.grad, whole.grad[rank * 3 : rank * 3 + 3])

    ids = torch.full((2, 3 + rank), 7 + rank)
    padded = dist.gather_padded(ids)
    assert padded.tolist() == [[7, 7, 7, 0], [7, 7, 7, 0], [8, 8, 8, 8], [8, 8, 8, 8]]
    keep = dist.gather_padded(ids > 0)
    assert keep.dtype == torch.bool
    assert keep.sum(1).tolist() == [3, 3, 4, 4]

    assert dist.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert dist.from_main(f"from {rank}") == "from 0"
    assert dist.any_process(rank == 1)
    assert not dist.any_process(False)
    mine = torch.tensor([1.0, rank])
    assert dist.total(mine).tolist() == [2.0, 1.0]
    assert mine.tolist() == [1.0, rank]
    dist.barrier()


def test_two_processes(zygote, tmp_path):
    statuses = zygote.run(tmp_path / "log", world=2, module="test_dist", function="two_processes")
    assert statuses == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()


def test_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    dist.start()
    value = torch.ones(2, 3, requires_grad=True)
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.gather(value), value)
    assert not dist.gather(value).requires_grad
    dist.gather_with_gradient(value).sum().backward()
    assert torch.equal(value.grad, torch.ones(2, 3))
    assert dist.gather_padded(value > 0).all()
    assert dist.gather_objects("x") == ["x"]
    assert dist.from_main("x") == "x"
    assert dist.any_process(True)
    assert dist.total(value).sum() == 6
    dist.barrier()
    assert not dist.lost_peer(RuntimeError("Connection closed by peer"))


@pytest.mark.parametrize(("variable", "answer"), [("true", True)])
def test_accelerate_can_ask_for_the_cpu(monkeypatch, variable, answer):
    monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
    assert dist.on_cpu() == answer


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, [8]),
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "3"}, [2]),
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "9"}, [1]),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "5"}, [5]),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "3"}, []),
        ({"OMP_NUM_THREADS": "1"}, []),
    ],
)
def test_the_one_thread_that_a_launcher_leaves_becomes_a_share_of_the_machine(environment, threads, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(dist.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(dist, "on_cpu", lambda: True)
    dist.start()
    assert given == threads


# What accelerate's configuration asks for


@pytest.fixture
def configured(monkeypatch):
    """An environment with nothing of a launcher but what is given."""

    def configure(**names):
        for name in (*dist._SHARDING, *dist._DECIDES, "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        return dist.set_aside()

    return configure


def test_what_the_runs_settings_decide_is_set_aside_with_a_note(configured):
    assert configured(ACCELERATE_DYNAMO_BACKEND="NO", ACCELERATE_MIXED_PRECISION="no") == []
    assert configured(ACCELERATE_DYNAMO_BACKEND="INDUCTOR", ACCELERATE_MIXED_PRECISION="bf16") == [
        "ACCELERATE_DYNAMO_BACKEND=INDUCTOR of accelerate's configuration is set aside: train.compile decides",
        "ACCELERATE_MIXED_PRECISION=bf16 of accelerate's configuration is set aside: train.precision decides",
    ]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_sharding_is_refused_unless_a_file_asks_it_of_one_process(configured, name):
    name = f"ACCELERATE_USE_{name}"
    for world in ({}, {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}):
        with pytest.raises(ValueError, match=f"^{name} is set, and models are not sharded"):
            configured(**{name: "true"}, **world)
    (note,) = configured(**{name: "true", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"})
    assert "one process has nothing to shard" in note
    assert name not in os.environ, "accelerate would shard all the same"
