"""The pre-training objective in two processes, against one that has both batches at hand and computes it plainly."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from stub_run import the_zygote
from test_objectives import build, make_batch

from blip import dist
from blip.objectives import negatives
from blip.objectives.batch import Batch
from blip.objectives.objective import Clock

# Of each process: the wrong image of its texts, the wrong text of its images, as rows of all ten pairs.
NEGATIVES = (
    (torch.tensor([7, 0, 9, 1, 5]), torch.tensor([3, 8, 0, 6, 9])),
    (torch.tensor([0, 9, 2, 5, 6]), torch.tensor([4, 5, 8, 1, 0])),
)
LENGTHS = ((9, 4, 12, 3, 7), (5, 16, 3, 8, 6))


@pytest.fixture
def zygote():
    return the_zygote()


def batch_of(rank: int) -> Batch:
    return make_batch(LENGTHS[rank], seed=rank + 1)


def both_batches() -> Batch:
    """The ten pairs in the order of ranks, padded to the longest text."""
    parts = [batch_of(0), batch_of(1)]
    longest = max(part.ids.shape[1] for part in parts)
    ids, keep = ([F.pad(getattr(p, name), (0, longest - p.ids.shape[1])) for p in parts] for name in ("ids", "keep"))
    keys = parts[0].keys + parts[1].keys
    return Batch(torch.cat([p.image for p in parts]), torch.cat(ids), torch.cat(keep), keys)


def expected(pretrain, rank: int) -> tuple[dict[str, torch.Tensor], tuple]:
    """Losses of one process and the teacher's features of its pairs, computed with all ten pairs in one process."""
    model, whole = pretrain.model, both_batches()
    own = slice(rank * 5, rank * 5 + 5)
    image_of_text, text_of_image = NEGATIVES[rank]
    batch = batch_of(rank)
    # ITC and LM know nothing of the other process, so the straightforward losses of the own batch are right.
    (itc, _, lm), teacher = oracle.losses(
        pretrain, batch.image, batch.ids, batch.keep, alpha=0.4, negatives=(torch.arange(5), torch.arange(5))
    )
    tokens = model.vision(whole.image)
    ids = whole.ids.clone()
    ids[:, 0] = model.config.text.enc_id
    images = torch.cat([tokens[own], tokens[image_of_text], tokens[own]])
    texts = torch.cat([ids[own], ids[own], ids[text_of_image]])
    keeps = torch.cat([whole.keep[own], whole.keep[own], whole.keep[text_of_image]])
    logits = model.match(texts, keeps, model.context(images))
    labels = torch.tensor([1] * 5 + [0] * 10)
    return {"itc": itc, "itm": F.cross_entropy(logits, labels), "lm": lm}, teacher


def negatives_from_everywhere() -> None:
    dist.start(60)
    rank = dist.rank()
    pretrain, seen = build(negatives_all_ranks=True), []
    answers = iter(NEGATIVES[rank])

    def drawn(cosines, temperature, floor, same):
        seen.append((cosines.detach(), same))
        return next(answers), None

    negatives.hard_negatives = drawn
    outcome = pretrain(batch_of(rank), Clock(epoch=1.0))
    sum(outcome.losses.values()).backward()
    ours = {name: p.grad for name, p in pretrain.model.named_parameters()}

    plain = build(negatives_all_ranks=True)
    theirs = [expected(plain, 0), expected(plain, 1)]
    for name, value in theirs[rank][0].items():
        torch.testing.assert_close(outcome.losses[name], value, rtol=1e-5, atol=1e-6, msg=name)
    # The images that a process looks at belong to another, so only the sum over processes is a gradient.
    sum(sum(losses.values()) for losses, _ in theirs).backward()
    for name, p in plain.model.named_parameters():
        summed = dist.total(ours[name])
        torch.testing.assert_close(summed, p.grad, rtol=1e-5, atol=1e-5 * p.grad.abs().max().item() + 1e-9, msg=name)

    # What is drawn from: the student's own rows against the teacher's of both processes.
    images, texts = (torch.cat([features[i] for _, features in theirs]) for i in (0, 1))
    student_image = plain.model.embed_image(plain.model.vision(batch_of(rank).image))
    student_text = plain.model.embed_text(batch_of(rank).ids, batch_of(rank).keep)
    for (cosines, same), by_hand in zip(seen, (student_text @ images.T, student_image @ texts.T), strict=True):
        torch.testing.assert_close(cosines, by_hand.detach(), rtol=1e-5, atol=1e-5)
        assert same.nonzero().tolist() == [[i, rank * 5 + i] for i in range(5)]


def negatives_from_here() -> None:
    dist.start(60)
    pretrain, seen = build(negatives_all_ranks=False), []
    real = negatives.hard_negatives
    negatives.hard_negatives = lambda *args: (seen.append(args), real(*args))[1]
    pretrain(batch_of(dist.rank()), Clock(epoch=1.0))
    assert [args[0].shape for args in seen] == [(5, 5)] * 2
    assert all(torch.equal(args[3], torch.eye(5, dtype=torch.bool)) for args in seen)


def queues_of_everyone() -> None:
    dist.start(60)
    pretrain = build(queue_size=13)
    carry = pretrain(batch_of(dist.rank()), Clock(epoch=1.0)).carry
    pretrain.after_step([carry])
    plain = build(queue_size=13)
    features = [plain(batch_of(rank), Clock(epoch=1.0)).carry for rank in (0, 1)]
    for queue, before, parts in (
        (pretrain.image_queue, plain.image_queue, [f.image.vector for f in features]),
        (pretrain.text_queue, plain.text_queue, [f.text.vector for f in features]),
    ):
        torch.testing.assert_close(queue.features[:10], torch.cat(parts), rtol=1e-6, atol=1e-6)
        assert torch.equal(queue.features[10:], before.features[10:])
        assert int(queue.next) == 10
        everywhere = dist.gather(queue.features)
        assert torch.equal(everywhere[:13], everywhere[13:])
    # A second step runs over the end of the ring: rows 0-2 at 10-12, rows 3-9 at 0-6.
    pretrain.after_step([carry])
    rows = torch.cat([f.text.vector for f in features])
    torch.testing.assert_close(pretrain.text_queue.features[10:], rows[:3], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pretrain.text_queue.features[:7], rows[3:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", ["negatives_from_everywhere", "negatives_from_here", "queues_of_everyone"])
def test_two_processes(zygote, tmp_path, function):
    statuses = zygote.run(tmp_path / "log", world=2, module="test_distributed", function=function)
    assert statuses == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
