"""The same numbers as the original pre-training code (recorded, see goldens/README.md) and as transformers' BLIP."""

import goldens
import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipTextModel

from blip.checkpoints.layouts import (
    original_pretraining,
    original_training,
    transformers_captioning,
    transformers_matching,
)
from blip.checkpoints.table import from_theirs, to_theirs
from blip.models.blip import Blip, starting_with
from blip.nn.text import TextPass
from blip.nn.vision import resize_positions
from blip.objectives import negatives
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain

TEXT = goldens.CONFIG.text


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# The original -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pretrain():
    objective = Pretrain(Blip(goldens.CONFIG), goldens.PRETRAIN)
    table = original_training(objective)
    objective.load_state_dict(from_theirs(table, goldens.checkpoint(), objective.state_dict(), "goldens"))
    return objective.train()


@pytest.fixture(scope="module")
def results():
    return goldens.results()


@pytest.fixture
def draws(monkeypatch, results):
    """Answer `negatives.draw` with the original's draws of a step, and note the weights it was given."""
    noted = []

    def replay(step):
        answers = [results[f"{step}.negative_image"], results[f"{step}.negative_text"]]
        noted.clear()

        def draw(weights):
            noted.append(weights)
            return answers[len(noted) - 1]

        monkeypatch.setattr(negatives, "draw", draw)
        return noted

    return replay


def step(pretrain, number, draws, trim=True):
    noted = draws(number)
    outcome = pretrain(goldens.batch(number, trim), Clock(epoch=float(number)))
    assert len(noted) == 2
    return outcome, noted


def losses_of(outcome):
    assert set(outcome.losses) == {"itc", "itm", "lm"}
    return torch.stack([outcome.losses[name] for name in ("itc", "itm", "lm")]).detach()


@pytest.mark.parametrize("trim", [False, True])
def test_losses_and_negative_weights(pretrain, results, draws, trim):
    outcome, (weights_t2i, weights_i2t) = step(pretrain, 0, draws, trim)
    close(losses_of(outcome), results["0.losses"])
    close(weights_t2i, results["weights_t2i"])
    close(weights_i2t, results["weights_i2t"])


def test_match_logits(pretrain, results, draws):
    seen = []
    pretrain.model.match_head.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    step(pretrain, 0, draws)
    close(torch.cat(seen), results["itm_logits"])


def test_tokens_and_similarities(pretrain, results):
    batch, model, towers = goldens.batch(0), pretrain.model, pretrain.teacher.towers
    tokens = model.vision(batch.image)
    close(tokens, results["image_tokens"])
    teacher_image = torch.cat([towers.embed_image(towers.vision(batch.image)), pretrain.image_queue.features])
    teacher_text = torch.cat([towers.embed_text(batch.ids, batch.keep), pretrain.text_queue.features])
    close(model.embed_image(tokens) @ teacher_text.T / model.temperature, results["sim_i2t"])
    close(model.embed_text(batch.ids, batch.keep) @ teacher_image.T / model.temperature, results["sim_t2i"])


def test_caption_logits(pretrain, results):
    batch, model = goldens.batch(0), pretrain.model
    context = model.context(model.vision(batch.image))
    logits = model.caption_logits(starting_with(batch.ids, TEXT.dec_id), batch.keep, context)
    close(logits[batch.keep], results["lm_logits"][batch.keep])


def test_every_gradient(pretrain, results, draws):
    outcome, _ = step(pretrain, 0, draws)
    sum(outcome.losses.values()).backward()
    table = original_pretraining(pretrain.model)
    gradients = to_theirs(table, {name: p.grad for name, p in pretrain.model.named_parameters()})
    expected = {name.removeprefix("grad."): value for name, value in results.items() if name.startswith("grad.")}
    assert set(expected) == {name for row in table.rows for name in row.theirs}
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-2)  # the gradient of a key's bias is only rounding error
        error = float((gradients[name] - gradient).abs().max() / scale)
        assert error < 5e-5, f"{name}: {error}"


def test_three_steps(pretrain, results, draws):
    optimizer = torch.optim.AdamW(pretrain.model.parameters(), lr=1e-3, weight_decay=0.05)
    for number in range(goldens.STEPS):
        outcome, _ = step(pretrain, number, draws)
        close(losses_of(outcome), results[f"{number}.losses"])
        optimizer.zero_grad()
        sum(outcome.losses.values()).backward()
        optimizer.step()
        pretrain.after_step([outcome.carry])
        state = to_theirs(original_training(pretrain), pretrain.state_dict())
        if number == 0:
            for queue in ("image_queue", "text_queue"):
                close(state[queue], results[f"after0.{queue}"])
            assert int(state["queue_ptr"]) == 20
            taught = {name.removeprefix("teacher1."): v for name, v in results.items() if name.startswith("teacher1.")}
            assert len(taught) == 5
            for name, value in taught.items():
                close(state[name], value, 1e-6)
    final = {name.removeprefix("final."): value for name, value in results.items() if name.startswith("final.")}
    assert int(state["queue_ptr"]) == int(final["queue_ptr"]) == 4
    for name, value in final.items():
        error = (state[name] - value).abs()
        if name.endswith("key.bias"):
            continue  # AdamW makes steps of full size out of a gradient that is only rounding error
        if name.endswith("qkv.bias"):
            query, _, value = error.chunk(3)
            error = torch.cat([query, value])
        assert float(error.max()) < 1e-5, f"{name}: {error.max()}"


@pytest.mark.parametrize("side", [3, 6])
def test_resized_positions(pretrain, results, side):
    resized = resize_positions(pretrain.model.vision.vit.pos_embed, side * 8, 8)
    close(resized, results[f"positions{side}"], 1e-6)


# transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = Blip(goldens.CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def transformers_config():
    vision = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "initializer_range": 0.02,
    }  # fmt: skip
    text = {
        "vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "encoder_hidden_size": 32, "layer_norm_eps": 1e-12,
        "bos_token_id": 97, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    return BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=16)


@pytest.fixture(scope="module")
def captioner(model):
    theirs = BlipForConditionalGeneration(transformers_config()).eval()
    theirs.load_state_dict(to_theirs(transformers_captioning(model), model.state_dict()), strict=True)
    return theirs


@pytest.fixture(scope="module")
def matcher(model):
    theirs = BlipForImageTextRetrieval(transformers_config()).eval()
    theirs.load_state_dict(to_theirs(transformers_matching(model), model.state_dict()), strict=True)
    return theirs


@torch.no_grad()
def test_vision_tower(model, captioner):
    image = goldens.batch(0).image
    close(model.vision(image), captioner.vision_model(image).last_hidden_state)


@torch.no_grad()
def test_text_encoder(model, matcher):
    batch = goldens.batch(0)
    (packed,) = model.med([one := TextPass(batch.ids, batch.keep)])
    theirs = matcher.text_encoder(batch.ids, attention_mask=batch.keep.long()).last_hidden_state
    close(one.layout.unpack(packed)[batch.keep], theirs[batch.keep])


@torch.no_grad()
def test_image_grounded_encoder(model, matcher):
    batch = goldens.batch(0)
    tokens = model.vision(batch.image)
    (packed,) = model.med([one := TextPass(batch.ids, batch.keep, context=model.context(tokens))])
    assert isinstance(matcher.text_encoder, BlipTextModel)
    theirs = matcher.text_encoder(batch.ids, attention_mask=batch.keep.long(), encoder_hidden_states=tokens)
    close(one.layout.unpack(packed)[batch.keep], theirs.last_hidden_state[batch.keep])


@torch.no_grad()
def test_match_and_cosine(model, matcher):
    batch = goldens.batch(0)
    ids = starting_with(batch.ids, TEXT.enc_id)
    tokens = model.vision(batch.image)
    inputs = {"pixel_values": batch.image, "attention_mask": batch.keep.long()}
    match = matcher(input_ids=ids, use_itm_head=True, **inputs).itm_score
    close(model.match(ids, batch.keep, model.context(tokens)), match)
    cosine = matcher(input_ids=batch.ids, use_itm_head=False, **inputs).itm_score
    close(model.embed_image(tokens) @ model.embed_text(batch.ids, batch.keep).T, cosine)


@torch.no_grad()
def test_decoder(model, captioner):
    batch = goldens.batch(0)
    ids = starting_with(batch.ids, TEXT.dec_id)
    ours = model.caption_logits(ids, batch.keep, model.context(model.vision(batch.image)))
    theirs = captioner(pixel_values=batch.image, input_ids=ids, attention_mask=batch.keep.long()).logits
    close(ours[batch.keep], theirs[batch.keep])
