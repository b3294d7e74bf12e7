"""The main job on the embedded world: pre-train TINY, measure retrieval, fine-tune a captioner, show what it says.

    python -m recipes.demo            # `make demo`: 2 CPU cores, about 5 minutes, no network

Options are those of `recipes.pretrain`. Writes report.html and results.json into runs/demo. Started again, it
continues, or says again what it found.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

from PIL import Image

from blip import atomic, checkpoint, page
from blip.config import SourceConfig
from blip.data.world import scene_of
from blip.data.world_judge import judge
from eval.captioning import captions_of
from eval.retrieval import Gallery, rank
from recipes import caption, command
from recipes.building import ModelChoice
from recipes.pretrain import Run, pretrain

CONFIG = "recipes/configs/pretrain_world.yaml"
CAPTIONER = "recipes/configs/caption_world.yaml"
SHARE = 0.25
"""Steps of the captioner, in steps of pre-training."""
SHOWN = 24
"""Pictures on the page."""
TOLD = ("cider", "attribute_precision", "attribute_recall", "all_true")
"""Scores of captions."""


def demo(run: Run) -> dict[str, float]:
    """Pre-train, fine-tune, evaluate, write the page; returns what results.json holds, scores in percent."""
    start, out = time.monotonic(), Path(run.out)
    result, folder = pretrain(run)
    captioning = captioner(run, folder, max(1, round(SHARE * result.steps)))
    captioned, written = caption.caption(captioning)

    model, tokenizer = checkpoint.from_pretrained(folder)
    exam = caption.Exam("test", captioning.test, captioning, model, tokenizer)
    before = exam.scores(captions_of(model, tokenizer, exam.pictures, captioning.decode, prompt=captioning.data.prompt))
    after = {name.removeprefix("test_"): value for name, value in captioned.metrics.items() if name.startswith("test_")}
    gallery = Gallery.open(run.held_out.source, model.vision.image_size)
    ranked = rank(model, tokenizer, *gallery, k=run.held_out.k).best_texts(3)
    scores = {
        **result.metrics,
        **{name: 100 * value for name, value in after.items()},
        **{f"{name}_pretrained": 100 * value for name, value in before.items()},
        "steps": result.steps,
        "seconds": time.monotonic() - start,
    }
    captions = {
        one["image_id"]: one["caption"] for one in json.loads((written.parent / "captions-test.json").read_text())
    }
    page.write(out / "report.html", _page(out, scores, _cards(run, captions, gallery, ranked), run))
    atomic.write_bytes(out / "results.json", (json.dumps(scores, indent=1) + "\n").encode())
    return scores


def captioner(run: Run, start_from: Path, steps: int) -> caption.Run:
    """The captioning run that goes on from a pre-training run, on its pictures."""
    settings = command.read(caption.Run, ["--config", CAPTIONER, "--out", str(Path(run.out) / "captioner")])
    validation = SourceConfig(str(Path(run.held_out.source.path).with_name("val.json")))
    return dataclasses.replace(
        settings,
        model=ModelChoice(start_from=str(start_from)),
        data=dataclasses.replace(settings.data, sources=run.data.sources),
        train=dataclasses.replace(settings.train, steps=steps, batch_size=run.train.batch_size, eval_each_epoch=False),
        validation=caption.HeldOut(validation, run.held_out.limit),
        test=caption.HeldOut(run.held_out.source, run.held_out.limit),
        world=None,
    )


def _cards(run: Run, captions: dict[str, str], gallery: Gallery, ranked: list[list[int]]) -> list[page.Card]:
    path = Path(run.held_out.source.path)
    rows = json.loads(path.read_text())[: min(SHOWN, len(captions))]
    return [
        page.Card(
            Image.open(path.parent / row["image"]),
            page.Text(captions[row["image_id"]], judge(scene_of(row["image_id"]), captions[row["image_id"]]).true),
            [page.Text(gallery.texts[t], gallery.image_of_text[t] == i) for t in ranked[i]],
            row["caption"][0],
        )
        for i, row in enumerate(rows)
    ]


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
    truth = [
        [
            stage,
            *(scores[f"{name}{suffix}"] for name in ("cider", "attribute_precision", "attribute_recall", "all_true")),
        ]
        for stage, suffix in (("pre-trained", "_pretrained"), ("captioner", ""))
    ]
    seen = (
        f"{scores['steps']:.0f} steps of {run.train.batch_size} pairs, in {scores['seconds']:.0f} seconds with all else"
    )
    return page.page(
        "BLIP on the picture world",
        [
            (
                "What happened",
                f"A model of size {run.model.size} was pre-trained from random weights: {seen}. A quarter as many "
                "steps more made a captioner of it.",
                "",
            ),
            (
                "Retrieval among held-out pictures, recall in percent",
                "The right one is among the first 1, 5 or 10, before and after the matching head looks at the best.",
                page.table(recalls, ["", "R@1", "R@5", "R@10"]),
            ),
            (
                "Captions of held-out pictures, greedy, percent",
                "CIDEr compares with five reference captions. Every claim about shape, colour, size, place, relation, "
                "count and background is checked against the scene: how many of those made are true, how many of "
                "those possible were made, and how many captions say nothing false.",
                page.table(truth, ["", "CIDEr", "claims true", "claims made", "captions true"]),
            ),
            ("The three losses of pre-training", "Means over log windows.", page.curves(series)),
            (
                "What it says of pictures it has never seen",
                "The captioner's text, and the three texts that the pre-trained model ranks first; a mark says what "
                "is right.",
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
    print("\ncaptions of held-out pictures, percent     CIDEr  claims true  claims made  captions true")
    for suffix, stage in (("_pretrained", "pre-trained"), ("", "captioner")):
        values = (scores[f"{name}{suffix}"] for name in TOLD)
        print(f"  {stage:<38}", "{:7.1f} {:12.1f} {:12.1f} {:14.1f}".format(*values))
    print(f"{scores['seconds']:.0f} seconds; {run.out}/report.html, {run.out}/results.json, {run.out}/model")


if __name__ == "__main__":
    command.run(main)
