"""Record what the original's own search says: `python record_search_2022.py OUT` (README.md, "240 searches").

On the path stand the original's folder at 056a169, transformers 4.15.0, timm 0.4.12, and an empty
`checkpoint_wrapper` as `fairscale.nn.checkpoint.checkpoint_activations`. Nothing of this project is imported.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
from models import blip, blip_vqa, vit
from safetensors.torch import load_file

HERE, ROWS, SEP = Path(__file__).parent, 60, 3
PROMPT = "w40 w7 w33 "
MORE_SEP = {"blip": 2.5, "vqa": 1.8}
CAPTION = {"num_beams": 3, "max_length": 20, "min_length": 5}
OTHER = {"num_beams": 5, "max_length": 16, "min_length": 6, "repetition_penalty": 1.1}


def small_vit(*_args, **_options):
    made = vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    return made, 32


def built(kind, tokenizer, settings, **options):
    with (
        mock.patch.object(sys.modules[kind.__module__], "create_vit", small_vit),
        mock.patch.object(transformers.BertTokenizer, "from_pretrained", return_value=tokenizer()),
    ):
        return kind(med_config=settings, **options).eval()


def fill(model, state, more_sep):
    own = model.state_dict()
    state = {name: state[name] for name in own if not name.endswith("position_ids")}
    for name in ("text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias"):
        state[name] = state[name].clone()
        state[name][SEP] += more_sep
    left = model.load_state_dict(state, strict=False)
    assert all(name.endswith("position_ids") for name in left.missing_keys), left


def searched(model, say, skip):
    """What `say` has the decoder search for: rows of ids behind `skip` of a prompt, up to [SEP] where there is one."""
    generate, outputs = model.text_decoder.generate, []

    def noted(**options):
        outputs.append(generate(**options))
        return outputs[-1]

    with mock.patch.object(model.text_decoder, "generate", noted):
        say()
    rows = [ids[skip:] for ids in outputs[0].tolist()]
    return [ids[: ids.index(SEP) + 1] if SEP in ids else ids for ids in rows]


@torch.no_grad()
def main(out):
    folder = Path(tempfile.mkdtemp())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = json.loads((Path(blip.__file__).parent.parent / "configs/med_config.json").read_text())
    settings |= {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 32, "vocab_size": 99, "encoder_width": 32,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    (folder / "med.json").write_text(json.dumps(settings))

    def tokenizer():
        return transformers.BertTokenizer(str(folder / "vocab.txt"))

    state = load_file(HERE / "weights.safetensors")
    state |= {second: state[first] for second, first in json.loads((HERE / "shared.json").read_text())["same"].items()}
    images = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = {}
    for name, prompt, length_penalty, how in (
        ("prompt", PROMPT, 1.0, CAPTION),
        ("no prompt", "", 1.0, CAPTION),
        ("five beams", PROMPT, 1.2, OTHER),
    ):
        model = built(blip.BLIP_Decoder, tokenizer, str(folder / "med.json"), image_size=32, prompt=prompt)
        fill(model, state, MORE_SEP["blip"])
        model.text_decoder.config.length_penalty = length_penalty
        texts[name] = searched(model, partial(model.generate, images, **how), model.prompt_length)

    settings["encoder_width"] = 24  # of the decoder; the original's encoder sets its own
    (folder / "med.json").write_text(json.dumps(settings))
    model = built(blip_vqa.BLIP_VQA, tokenizer, str(folder / "med.json"), image_size=32)
    g = torch.Generator().manual_seed(3)
    tied = "text_decoder.cls.predictions.decoder"
    for name in sorted(n for n in model.state_dict() if n.startswith("text_decoder.") and not n.startswith(tied)):
        if not name.endswith("position_ids"):
            drawn = torch.randn(model.state_dict()[name].shape, generator=g)
            state[name] = 0.15 * drawn + name.endswith("LayerNorm.weight")
    state[f"{tied}.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state[f"{tied}.bias"] = state["text_decoder.cls.predictions.bias"]
    fill(model, state, MORE_SEP["vqa"])
    questions = [f"w{i} w{(7 * i) % 92} w{(3 * i + 5) % 92}" for i in range(ROWS)]
    texts["answers"] = searched(model, partial(model, images, questions, train=False, inference="generate"), 1)
    lines = ",\n".join(f' "{name}": {json.dumps(rows, separators=(",", ":"))}' for name, rows in texts.items())
    Path(out).write_text(f"{{\n{lines}\n}}\n")
    print(
        transformers.__version__,
        {name: [len(set(map(tuple, rows))), sum(map(len, rows))] for name, rows in texts.items()},
    )


if __name__ == "__main__":
    main(sys.argv[1])
