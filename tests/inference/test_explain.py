"""Maps against transformers' attention and its gradients, a case that is clear, and the command."""

import re

import pytest
import torch
from PIL import Image
from test_cli import model as model_folder  # noqa: F401
from test_cli import png
from test_features import photos, tokenizer, tokens  # noqa: F401
from test_parity import close, matcher, model  # noqa: F401

from blip import files
from blip.app import cli
from blip.app.commands import explain as explain_command
from blip.inference.explain import evidence, explain, overlay
from blip.inference.features import match_texts

TEXT = "w3 w9 w14 w1"


def theirs(matcher, tokens, ids, layer):  # noqa: F811
    """Probabilities of transformers' cross-attention and the gradient of the match logit with respect to them."""
    seen = []
    attention = matcher.text_encoder.encoder.layer[layer].crossattention.self
    hook = attention.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    state = matcher.text_encoder(ids, encoder_hidden_states=tokens).last_hidden_state[:, 0]
    hook.remove()
    logit = matcher.itm_head(state)[0, 1]
    (gradient,) = torch.autograd.grad(logit, seen[0])
    return seen[0][0].detach(), gradient[0], logit.detach()


@pytest.mark.parametrize("layer", [0, 1])
def test_evidence_is_that_of_transformers(model, tokenizer, matcher, tokens, layer):  # noqa: F811
    first = tokens[:1]
    ids, _ = tokenizer.encode([TEXT], first="enc", max_length=30)
    ours = evidence(model, first, ids, layer)
    probabilities, gradients, logit = theirs(matcher, first, ids, layer)
    assert ours.probabilities.shape == (2, 6, 17)
    close(ours.probabilities, probabilities)
    close(ours.probabilities.sum(-1), torch.ones(2, 6))
    scale = gradients.abs().max()
    close(ours.gradients / scale, gradients / scale)
    assert gradients.min() < 0 < gradients.max(), "the test needs gradients of both signs"
    close(ours.logits[1], logit)
    close(ours.weighted, (probabilities * gradients.clamp(min=0)).mean(0))


def test_only_what_is_there_is_evidence(model, tokenizer):  # noqa: F811
    """Where one patch alone has values to give, it alone gets the whole map."""
    cross = model.med.blocks[1].cross
    width = model.config.text.width
    before = cross.kv.bias.detach().clone()
    lit = torch.zeros(1, 17, model.vision.width)
    lit[0, 6] = torch.randn(model.vision.width, generator=torch.Generator().manual_seed(2))
    ids, _ = tokenizer.encode([TEXT], first="enc", max_length=30)
    try:
        with torch.no_grad():
            cross.kv.bias[width:] = 0
        ours = evidence(model, lit, ids, 1)
    finally:
        cross.kv.bias.data.copy_(before)
    # The last layer's answer comes from [ENC] alone, so other tokens' attention there changes nothing.
    assert ours.gradients[:, 1:].abs().max() == 0
    assert ours.gradients[:, 0, 6].abs().max() > 0
    others = torch.arange(17) != 6
    assert ours.gradients[:, 0, others].abs().max() < 1e-7 * ours.gradients.abs().max()


def test_words_and_their_maps(model, tokenizer, tokens):  # noqa: F811
    explanation = explain(model, tokenizer, tokens[:1], "W3, zebra w9!", layer=0)
    assert explanation.words == ["w3,", "zebra", "w9"]
    assert explanation.maps.shape == (3, 4, 4)
    assert explanation.maps.min() >= 0
    # "w3," is two pieces, and the mean over all pieces counts it twice.
    close(explanation.whole, (2 * explanation.maps[0] + explanation.maps[1] + explanation.maps[2]) / 4)
    matched = match_texts(model, tokenizer, [tokens[:1]], ["W3, zebra w9!"])
    assert explanation.probability == pytest.approx(matched.probability.item(), abs=1e-6)


def test_a_long_text_loses_whole_words(model, tokenizer, tokens):  # noqa: F811
    explanation = explain(model, tokenizer, tokens[:1], "w1 w2 w3, w4", layer=0, max_tokens=6)
    assert explanation.words == ["w1", "w2", "w3,"]


def test_the_fast_path_stays_as_it_was(model, tokenizer, tokens):  # noqa: F811
    before = match_texts(model, tokenizer, [tokens], [TEXT])
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, tokenizer, tokens[:1], TEXT)
    after = match_texts(model, tokenizer, [tokens], [TEXT])
    assert torch.equal(before.logits, after.logits)
    assert all(torch.equal(parameters[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_layers_and_texts_that_will_not_do(model, tokenizer, tokens):  # noqa: F811
    def maps(text, layer=None):
        return explain(model, tokenizer, tokens[:1], text, layer).maps

    with pytest.raises(ValueError, match="layer must be 0 to 0, got 1"):
        maps(TEXT, layer=1)
    assert torch.equal(maps(TEXT), maps(TEXT, layer=0))
    assert maps(TEXT).max() > 0
    with pytest.raises(ValueError, match="layer must be 0 to 1, got -1"):
        evidence(model, torch.zeros(1, 17, 32), torch.tensor([[98, 3]]), -1)
    with pytest.raises(ValueError, match="cannot be compared"):
        maps("!!")


def test_overlay_is_hot_where_the_map_is():
    heat = torch.zeros(4, 4)
    heat[0, 3] = 2.0
    made = overlay(Image.new("RGB", (64, 64), (0, 200, 0)), heat, 2.0)
    red, _, blue = made.getpixel((60, 3))
    assert red > 180
    assert blue < 60
    grey = round(200 * 587 / 1000)
    assert made.getpixel((3, 60)) == (grey, grey, grey), "what has no evidence has no colour"
    assert made.size == (64, 64)


def test_stop_words_are_not_shown(features, photos):  # noqa: F811
    explanation = explain(features, photos[0], "the W3 on a zebra.", layer=0)
    assert [explanation.words[i] for i in explain_command.shown_words(explanation)] == ["w3", "zebra"]
    panels = explain_command.images(Image.new("RGB", (32, 32)), explanation)
    assert [name for name, _ in panels] == ["the image", "the whole text", "w3", "zebra"]
    nothing_else = explain(features, photos[0], "on the", layer=0)
    assert explain_command.shown_words(nothing_else) == [0, 1]


def test_command(model_folder, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setenv("OPENBLIP_MODEL", model_folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))
    assert cli.main(["explain", "a.png", "a red <star>", "--out", "e.html"]) == 0
    name, probability, out = capfd.readouterr().out.strip().split("\t")
    assert (name, out) == ("a.png", "e.html")
    page = (tmp_path / "e.html").read_text()
    assert page.count("<img ") == 4
    (percent,) = re.findall(r"<h1>([0-9.]+)% sure that", page)
    assert float(percent) == pytest.approx(100 * float(probability), abs=0.06)
    assert "&lt;star&gt;" in page
    assert "<star>" not in page
    titles = re.findall(r'<p class="first"><span dir="auto">(.*?)</span>', page)
    assert titles == ["the image", "the whole text", "red", "&lt;star&gt;"], "the image first, and no a"
    assert 'aria-label="Legend' in page
    assert cli.main(["explain", "a.png", "a red star", "--out", "e.png", "--layer", "0"]) == 0
    assert Image.open("e.png").size == (4 * 224, 244)
    capfd.readouterr()
    (tmp_path / "a.png").rename("a\nb.png")
    with monkeypatch.context() as patch:  # what is there stays until the new one is whole
        patch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SystemExit):
            cli.main(["explain", "a\nb.png", "a ring", "--out", "e.html"])
    assert (tmp_path / "e.html").read_text() == page
    capfd.readouterr()
    assert cli.main(["explain", "a\nb.png", "a ring", "--out", "e.jpg"]) == 0
    assert capfd.readouterr().out.startswith("a\\nb.png\t")
    assert Image.open("e.jpg").format == "JPEG"
    (tmp_path / "a\nb.png").rename("a.png")
    (tmp_path / "broken.png").write_bytes(b"<html>")
    wrong = {
        ("gone.png", "x", "--out", "e.png"): "gone.png: no such file",
        ("broken.png", "x", "--out", "e.png"): "broken.png: is an HTML page",
        ("a.png", "x", "--out", "e.txt"): "ends in .html, .png or .jpg",
        ("a.png", "a star", "--out", "e.png", "--layer", "7"): "layer must be 0 to",
        ("a.png", "a star", "--out", "gone/e.png"): "gone/e.png",
    }
    for args, message in wrong.items():
        with pytest.raises(SystemExit) as stop:
            cli.main(["explain", *args])
        assert stop.value.code == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
