"""Zero-shot classification by hand, and `blip classify`."""

import pytest
import torch
from test_cli import lines, model, photos  # noqa: F401
from test_search import features, run  # noqa: F401

from blip.inference.zero_shot import TEMPLATES, class_embeddings, probabilities, texts_of

NAMES = ["red circle", "orange star", "moon"]


def test_templates():
    assert texts_of("moon", ["{}", "a photo of a {}", "a {}"]) == ["moon", "a photo of a moon", "a moon"]
    assert texts_of("orange", ["a {}", "the {}", "gala {}"]) == ["an orange", "the orange", "gala orange"]
    assert len(set(texts_of("ring"))) == len(TEMPLATES)
    for template in ("an image", "{} and {}"):
        with pytest.raises(ValueError, match=r"needs one \{\}"):
            texts_of("moon", [template])


def test_classes_are_means_over_templates(features):  # noqa: F811
    embeddings = class_embeddings(features.embed_text, NAMES, ["a {}", "the {} here"])
    for name, vector in zip(NAMES, embeddings, strict=True):
        article = "an" if name.startswith("o") else "a"
        both = features.embed_text([f"{article} {name}", f"the {name} here"])
        mean = both.mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())
    for names, message in ((["a", "b", "a"], "'a' is named twice"), ([], "nothing to classify"), (["a", " "], "empty")):
        with pytest.raises(ValueError, match=message):
            class_embeddings(features.embed_text, names)


def test_probabilities_are_a_softmax_at_the_learned_temperature(features, photos):  # noqa: F811
    classes = class_embeddings(features.embed_text, NAMES)
    image = features.embed_image(["photos/p1.png", "photos/p2.png"])
    chances = probabilities(image, classes, features.model.temperature)
    logits = image @ classes.T / features.model.temperature.item()
    torch.testing.assert_close(chances, logits.exp() / logits.exp().sum(1, keepdim=True))


def test_command(run, photos, features):  # noqa: F811
    classes = class_embeddings(features.embed_text, NAMES)
    expected = probabilities(features.embed_image("photos/p3.png"), classes, features.model.temperature)[0]
    order = expected.argsort(descending=True).tolist()
    status, out, err = run("classify", "photos/p3.png", "--classes", ",".join(NAMES), "--top", 2)
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"photos/p3.png\t{NAMES[i]}\t{expected[i]:.4f}" for i in order[:2]]
    # With the mark that some editors begin a file with, which is no part of a name.
    (photos.parent / "names.txt").write_text("\n".join(NAMES) + "\n\n", encoding="utf-8-sig")
    _, out, _ = run("classify", "photos", "--classes-file", "names.txt", "--json", "--top", 9, "--batch", 4)
    answers = lines(out)
    assert len(answers) == 11
    assert answers[2]["classes"] == [NAMES[i] for i in order]
    assert sum(answers[2]["probability"]) == pytest.approx(1, abs=1e-4)
    one = run("classify", "photos/p3.png", "--classes", "moon,ring", "--template", "a {}")[1]
    classes = class_embeddings(features.embed_text, ["moon", "ring"], ["a {}"])
    chance = probabilities(features.embed_image("photos/p3.png"), classes, features.model.temperature)[0]
    assert one.split("\t")[2] == f"{chance.max():.4f}\n"


def test_command_says_what_is_wrong(run, photos):  # noqa: F811
    (photos.parent / "latin.txt").write_bytes("caf\u00e9".encode("latin1"))
    wrong = {
        ("photos",): "--classes",
        ("photos", "--classes", " , "): "contains no class names",
        ("photos", "--classes", "a,a"): "'a' is named twice",
        ("photos", "--classes", "a,b", "--template", "x"): "needs one {}",
        ("photos", "--classes-file", "gone.txt"): "gone.txt",
        ("photos", "--classes-file", "latin.txt"): "not UTF-8",
        ("photos", "--classes", "a", "--classes-file", "b"): "give either --classes",
    }
    for args, message in wrong.items():
        status, out, err = run("classify", *args)
        assert (status, out) == (2, ""), args
        assert message in err
        assert err.count("\n") == 1
