"""The text transformer: passes side by side, contexts, the cache, and what is refused."""

import pytest
import torch
from test_objectives import CONFIG, make_batch

from blip.models.blip import Blip, Captioner, Matcher, Towers, med
from blip.nn.packing import Layout
from blip.nn.settings import TrainingOptions
from blip.nn.text import TextPass


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    model = Blip(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def batch():
    return make_batch()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_layout_packs_and_unpacks_with_gradients():
    keep = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    layout, grid = Layout(3, 3, keep), torch.randn(3, 3, 4, requires_grad=True)
    packed = layout.pack(grid)
    assert torch.equal(packed, grid[keep])
    packed.square().sum().backward()
    assert torch.equal(grid.grad, 2 * grid.detach() * keep[..., None])
    flat = torch.randn(6, 4, requires_grad=True)
    unpacked = layout.unpack(flat)
    assert torch.equal(unpacked[keep], flat)
    weights = torch.randn(3, 3, 4)
    (unpacked * weights * keep[..., None]).sum().backward()
    assert torch.equal(flat.grad, weights[keep])
    assert torch.equal(layout.first(flat), flat[[0, 3, 4]])


def test_side_by_side_equals_one_at_a_time(model, batch):
    context = model.context(model.vision(batch.image))
    other = torch.tensor([1, 2, 3, 4, 0])
    passes = [
        TextPass(batch.ids, batch.keep, context=context, first=True),
        TextPass(batch.ids[other], batch.keep[other], context=context[other], first=True),
        TextPass(batch.ids, batch.keep, causal=True, context=context),
        TextPass(batch.ids, batch.keep, first=True),
        TextPass(batch.ids[other], batch.keep[other], causal=True, context=context),
        TextPass(batch.ids, batch.keep, context=context),
        TextPass(batch.ids, batch.keep),
    ]
    together = model.med(passes)
    for one, states in zip(passes, together, strict=True):
        (alone,) = model.med([one])
        close(states, alone)


def test_reading_the_first_token_only_equals_reading_all(model, batch):
    (first,) = model.med([TextPass(batch.ids, batch.keep, first=True)])
    every = TextPass(batch.ids, batch.keep)
    (states,) = model.med([every])
    close(first, every.layout.unpack(states)[:, 0])


def test_a_text_alone_equals_a_text_in_a_padded_batch(model, batch):
    context = model.context(model.vision(batch.image))
    together = model.match(batch.ids, batch.keep, context)
    logits = model.caption_logits(batch.ids, batch.keep, context)
    for row, length in enumerate(batch.keep.sum(1).tolist()):
        one = context[torch.tensor([row])]
        ids, keep = batch.ids[row : row + 1, :length], batch.keep[row : row + 1, :length]
        close(model.match(ids, keep, one), together[row : row + 1])
        close(model.caption_logits(ids, keep, one), logits[row : row + 1, :length])
        close(model.embed_text(ids, keep), model.embed_text(batch.ids, batch.keep)[row : row + 1])


def test_many_texts_on_one_image_equal_the_image_repeated(model, batch):
    tokens = model.vision(batch.image[:1])
    shared = model.match(batch.ids, batch.keep, model.context(tokens).expand(5))
    repeated = model.match(batch.ids, batch.keep, model.context(tokens.expand(5, -1, -1)))
    close(shared, repeated)


def test_masked_context_tokens_do_not_count(model, batch):
    tokens = model.vision(batch.image)
    keep = torch.ones(5, tokens.shape[1], dtype=torch.bool)
    keep[:, 10:] = False
    masked = model.match(batch.ids, batch.keep, model.med.context(tokens, keep))
    close(masked, model.match(batch.ids, batch.keep, model.context(tokens[:, :10])))
    index = torch.tensor([3, 3, 0, 1, 2])
    again = model.match(batch.ids[index], batch.keep[index], model.med.context(tokens, keep)[index])
    close(again, masked[index])


def test_a_padded_layout_computes_what_a_packed_one_does(model, batch, monkeypatch):
    """The layout of other devices, where padding stays in the grid."""
    context = model.context(model.vision(batch.image))
    packed = model.match(batch.ids, batch.keep, context), model.caption_logits(batch.ids, batch.keep, context)

    def padded(self, rows, length, keep=None):
        self.rows, self.length, self.keep, self.cells = rows, length, keep, None
        self.mask = None if keep is None else keep[:, None, None, :]

    monkeypatch.setattr(Layout, "__init__", padded)
    close(model.match(batch.ids, batch.keep, context), packed[0])
    close(model.caption_logits(batch.ids, batch.keep, context), packed[1])


def test_a_text_only_transformer_has_no_grounded_parts():
    text = med(CONFIG.text, TrainingOptions(), ("text",))
    names = {name.split(".")[2] for name, _ in text.named_parameters() if name.startswith("blocks")}
    assert names == {"text", "text_norm", "up", "down", "ffn_norm"}
    assert set(Towers(CONFIG).state_dict()) < set(Matcher(CONFIG).state_dict()) < set(Blip(CONFIG).state_dict())
    assert set(Matcher(CONFIG).state_dict()) | set(Captioner(CONFIG).state_dict()) == set(Blip(CONFIG).state_dict())


def test_what_cannot_be_run_is_refused(model, batch):
    context = model.context(model.vision(batch.image))
    with pytest.raises(ValueError, match="must have one segment"):
        model.med([TextPass(batch.ids, batch.keep, causal=True, context=context, first=True)])
    with pytest.raises(ValueError, match="41 tokens exceeds the model's 40"):
        model.med([TextPass(torch.ones(1, 41).long(), torch.ones(1, 41).bool())])
    with pytest.raises(ValueError, match="5 texts for 2 contexts"):
        model.match(batch.ids, batch.keep, context[torch.tensor([0, 1])])
