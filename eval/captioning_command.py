"""`blip-eval captioning`: from a model and pictures, or from captions that are there, to scores and a page."""

from __future__ import annotations

from pathlib import Path

from blip import dist
from blip.app.loaded import load
from eval.caption_page import report
from eval.captioning import Scores, captions_of, coco_results, score
from eval.options import Captioning
from eval.pictures import Pictures
from eval.references import Id, read_references, read_results
from eval.results_folder import ResultsFolder, interval, settings_of


def run(options: Captioning) -> Scores | None:
    """Write what is asked for, score it and leave files; returns the scores in the main process.

    None where there is nothing to compare with, as for NoCaps's test images, and in the other processes.
    """
    dist.start()
    pictures = Pictures.open(options.source, options.limit) if options.source else None
    entries = read_references(Path(options.references)) if options.references else pictures.entries
    out = ResultsFolder(options.out)
    results = _written(options, pictures) if options.model else read_results(Path(options.results))
    if not dist.is_main():
        return None
    out.write("results.json", coco_results(results))
    references = {entry.id: entry.captions for entry in entries}
    if options.model and not any(references.values()):
        print(f"{len(results)} captions are in {out / 'results.json'}; without references there is nothing to score")
        return None
    scores = score(
        references,
        results,
        tokenizer=options.tokenizer,
        meteor=options.meteor,
        spice=options.spice,
        groups={entry.id: entry.domain.removesuffix("-domain") for entry in entries if entry.domain},
        resamples=options.resamples,
        seed=options.seed,
        allow_partial=options.allow_partial,
        seconds=options.java_timeout,
        spice_folder=options.spice_folder,
    )
    print(table(scores))
    if out.where:
        record = scores.record() | _settings(options)
        html = report(record, scores.cider, references, results, pictures, options.shown)
        out.write("captions.html", html)
        out.write_scores(record)
        print(f"results.json, scores.json and captions.html are in {out.where}")
    return scores


def _written(options: Captioning, pictures: Pictures) -> dict[Id, str]:
    loaded = load(options.model, options.device, options.precision)
    ways = {"prompt": options.prompt, "batch": options.batch, "threads": options.threads}
    with loaded.computing():
        return captions_of(loaded.model, loaded.tokenizer, pictures, options.decode, **ways)


def _settings(options: Captioning) -> dict[str, object]:
    """What the scores depend on, for the record."""
    names = ("model", "prompt", "decode", "limit") if options.model else ()
    files = {"results_file": options.results, "references_file": options.references}
    return settings_of(options, *names, "source") | {name: path for name, path in files.items() if path is not None}


def table(scores: Scores) -> str:
    """Scores for people, times 100 as papers print them."""
    lines = [
        f"{scores.images} images, {scores.references} reference captions; words by {scores.tokenizer}",
        *([f"left out for want of a result: {scores.missing} images"] if scores.missing else []),
        *(f"{name} not computed: {why}" for name, why in scores.not_computed.items()),
    ]
    for name, value in scores.values.items():
        if not name.endswith(("_low", "_high")):
            lines.append(f"{name:<16}{100 * value:7.2f}{interval(scores.values, name)}")
    return "\n".join(lines)
