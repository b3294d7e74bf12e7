"""The main job on the embedded world: pre-train TINY, measure retrieval of held-out pictures, show what it says.

    python -m recipes.demo            # `make demo`: 2 CPU cores, under 5 minutes, no network

Writes report.html and results.json into runs/demo. Started again, it continues, or says again what it found.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from PIL import Image

from blip import atomic, checkpoint, page
from blip.config import DecodeConfig
from blip.data.world import scene_of
from blip.data.world_judge import judge
from blip.generate import write
from blip.model import Blip
from blip.tokenizer import Tokenizer
from eval.retrieval import Gallery, rank
from recipes import command
from recipes.pretrain import Run, pretrain

CONFIG = "recipes/configs/pretrain_world.yaml"
SAY = DecodeConfig(beams=1, max_length=40, min_length=0)
SHOWN = 24
"""Pictures on the page."""


def demo(run: Run) -> dict[str, float]:
    """Pre-train, evaluate, write the page; returns what results.json holds."""
    start, out = time.monotonic(), Path(run.out)
    result, folder = pretrain(run)
    model, tokenizer = checkpoint.from_pretrained(folder)
    rows = json.loads(Path(run.held_out.source.path).read_text())
    gallery = Gallery.open(run.held_out.source, model.vision.image_size)
    scenes = [scene_of(row["image_id"]) for row in rows]
    captions = say(model, tokenizer, gallery)
    ranked = rank(model, tokenizer, *gallery, k=run.held_out.k).best_texts(3)
    verdicts = [judge(scene, caption) for scene, caption in zip(scenes, captions, strict=True)]
    scores = {
        **result.metrics,
        "captions_right": 100 * sum(v.true for v in verdicts) / len(verdicts),
        "attribute_precision": 100 * sum(v.precision for v in verdicts) / len(verdicts),
        "attribute_recall": 100 * sum(v.recall for v in verdicts) / len(verdicts),
        "steps": result.steps,
        "seconds": time.monotonic() - start,
    }
    root = Path(run.held_out.source.path).parent
    items = [
        page.Card(
            Image.open(root / rows[i]["image"]),
            page.Text(captions[i], verdicts[i].true),
            [page.Text(gallery.texts[t], gallery.image_of_text[t] == i) for t in ranked[i]],
            rows[i]["caption"][0],
        )
        for i in range(min(SHOWN, len(rows)))
    ]
    page.write(out / "report.html", _page(out, scores, items, run))
    atomic.write_bytes(out / "results.json", (json.dumps(scores, indent=1) + "\n").encode())
    return scores


def say(model: Blip, tokenizer: Tokenizer, gallery: Gallery) -> list[str]:
    """The greedy caption of each picture."""
    return [text.words for images in gallery.images for (text,) in write(model, tokenizer, images, SAY)]


def _page(out: Path, scores: dict[str, float], items: list[page.Card], run: Run) -> str:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "losses" in line]
    names = {"itc": "ITC, contrastive", "itm": "ITM, matching", "lm": "LM, captioning"}
    series = {title: [(line["step"], line["losses"][name]) for line in logged] for name, title in names.items()}
    recalls = [
        [f"{direction}, {stage}", *(scores[f"{key}@{r}{suffix}"] for r in (1, 5, 10))]
        for direction, key in (("picture to text", "tr"), ("text to picture", "ir"))
        for stage, suffix in (("ITC alone", "_itc"), ("re-ranked by ITM", ""))
    ]
    seen = f"{scores['steps']:.0f} steps of {run.train.batch_size} pairs in {scores['seconds']:.0f} seconds"
    return page.page(
        "BLIP pre-trained on the picture world",
        [
            ("What happened", f"A model of size {run.model.size}, from random weights: {seen}.", ""),
            (
                "Retrieval among held-out pictures, recall in percent",
                "The right one is among the first 1, 5 or 10, before and after the matching head looks at the best.",
                page.table(recalls, ["", "R@1", "R@5", "R@10"]),
            ),
            ("The three losses", "Means over log windows.", page.curves(series)),
            (
                "What it says of pictures it has never seen",
                f"Its greedy caption ({scores['captions_right']:.0f}% of all are true in every word), and the three "
                "texts that it ranks first; ✓ marks what is right.",
                page.cards(items),
            ),
        ],
    )


def main() -> None:
    run = command.read(Run, ["--config", CONFIG, "--out", "runs/demo", *sys.argv[1:]])
    scores = demo(run)
    print("\nheld-out retrieval, recall in percent      R@1    R@5   R@10")
    for key, title in (("tr", "picture to text"), ("ir", "text to picture")):
        for suffix, stage in (("_itc", "ITC alone"), ("", "re-ranked")):
            print(f"  {title:<18}{stage:<20}", *(f"{scores[f'{key}@{r}{suffix}']:6.1f}" for r in (1, 5, 10)))
    print(f"captions true in every word: {scores['captions_right']:.1f}%, of attributes said: "
          f"{scores['attribute_precision']:.1f}% right")  # fmt: skip
    print(f"{scores['seconds']:.0f} seconds; {run.out}/report.html, {run.out}/results.json, {run.out}/model")


if __name__ == "__main__":
    command.run(main)
