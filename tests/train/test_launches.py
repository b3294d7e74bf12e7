"""How much a training step launches on a GPU: the host that launches it must not be slower than the GPU."""

import dataclasses

import pytest

from blip.models.presets import TINY

pytest.importorskip("fake_cuda")
import launches


@pytest.fixture(scope="module")
def step():
    with pytest.MonkeyPatch.context() as patch:
        return launches.pretraining(patch, TINY, 4)


def total(parts, *kinds):
    return sum(part.count[kind] for part in parts.values() for kind in kinds)


def test_a_step_of_tiny_launches_few_operations(step):
    assert sum(part.count.total() for part in step.values()) < 1000


def test_weights_are_cast_together(step, monkeypatch):
    """Four blocks of images, two of text, the rest, and the teacher; autocast casts some 120 and 60 tensors."""
    plain = launches.pretraining(monkeypatch, TINY, 4, cast_once=False)
    assert total(step, "_foreach_copy_") == (4 + 2 + 1) * 2 + 1
    assert total(plain, "_to_copy") - total(step, "_to_copy") > 150


def test_what_follows_the_backward_pass_is_done_to_all_tensors_at_once(step):
    """Whatever their number: the norm of the gradients, the clipping, the optimizer, the teacher."""
    assert step["clip"].count.total() < 10
    assert step["optimizer"].count.total() < 5
    assert step["after_step"].count.total() < 25


def test_layers_of_text_share_one_projection_of_the_image(monkeypatch, step):
    deeper = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, layers=4))
    deep = launches.pretraining(monkeypatch, deeper, 4)
    assert total(deep, "index_select", "index_add") == total(step, "index_select", "index_add") == 2
