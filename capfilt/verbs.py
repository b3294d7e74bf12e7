"""What each verb of the command takes and does."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from capfilt import options
from capfilt.score.make import scorer_maker
from capfilt.settings import DONE, FAILED_PARTS, WRONG, ReadConfig, ScoreConfig


def _plan_options(parser: ArgumentParser) -> None:
    _input_options(parser)
    parser.add_argument("--extend", action="store_true", help="add new files to a run that is planned already")
    _setting_options(parser)


def _input_options(parser: ArgumentParser) -> None:
    what = "file, folder, glob, list like {0..9}.tar or {a,b}.tar, or hf:NAME[@REVISION]; may be repeated"
    parser.add_argument("--input", action="append", default=[], metavar="PATH", help=what)
    parser.add_argument("--out", required=True, metavar="RUN", help="folder of the run, or an object store's address")
    parser.add_argument("--part-size", type=int, metavar="INT",
                        help="rows scored and committed together [1024 with a GPU, 64 without]")  # fmt: skip
    parser.add_argument("--allow-damaged", action="store_true", help="damaged files are no reason for exit status 2")


def _setting_options(parser: ArgumentParser) -> None:
    options.add(parser, ReadConfig, skip=("inputs",), title="how the input is read")
    options.add(parser, ScoreConfig, title="how rows are scored (all of it is in the fingerprint)")


def _plan(given: Namespace) -> int:
    from capfilt import plan

    if given.extend:
        from capfilt.run import Run

        _refuse_drift(Run.open(given.out), given)
        run, new = plan.extend(given.out, given.input)
        print(f"{len(new)} new files with {sum(s.rows for s in new):,} rows")
    else:
        config, reading = options.build(ScoreConfig, given), options.build(ReadConfig, given, inputs=given.input)
        run = plan.make(given.out, config, reading, given.part_size)
    _describe(run)
    damaged = run.damaged()
    for source in damaged:
        print(f"source_damaged: {source.path}: {source.damage}", file=sys.stderr)
    if damaged and not given.allow_damaged:
        print(f"{len(damaged)} damaged; what can be read is planned. --allow-damaged accepts that", file=sys.stderr)
        return WRONG
    return DONE


def _describe(run) -> None:
    size = sum(s.size for s in run.sources.values())
    print(
        f"{run.where}: {run.rows:,} rows of {len(run.sources)} files ({size / 1e9:.2f} GB) in {len(run.plan):,} parts "
        f"of up to {run.job['part_size']}; fingerprint {run.fingerprint}"
    )
    for source in run.sources.values():
        for note in source.notes:
            print(f"  {source.relpath}: {note}")
    if run.config.scorer == "blip":
        exact = run.config.dtype == "float32"
        print(f"computes in {run.config.dtype}; " + (
            "on a GPU, --dtype bfloat16 is several times as fast" if exact else
            "a text or score may depend on its batch, and with --dtype float32 it does not"))  # fmt: skip
        print("`capfilt score RUN --dry-run` measures how long it will take")


def _score_options(parser: ArgumentParser) -> None:
    from capfilt.score.loop import ScoreOptions

    parser.add_argument("run", metavar="RUN")
    _engine_options(parser)
    options.add(parser, ScoreOptions, skip=("rank", "world"), title="how the work is done (no result depends on it)")
    options.add(parser, ScoreConfig, title="settings of the plan: refused if they differ from it")


def _engine_options(parser: ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("embedded", "ray"), default="embedded",
                        help="ray: several GPUs or machines [embedded]")  # fmt: skip
    parser.add_argument("--workers", type=int, default=None, metavar="INT", help="scorers that Ray runs [one per GPU]")
    parser.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1, ... [the GPU of the local rank, where there are GPUs]"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="score 64 rows, say how long all would take, write nothing"
    )


def _score(given: Namespace) -> int:
    from capfilt.run import Run
    from capfilt.score.loop import ScoreOptions, score

    run = Run.open(given.run)
    _refuse_drift(run, given)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    how = options.build(ScoreOptions, given, rank=rank, world=world)
    maker = scorer_maker(given.device)
    if given.dry_run:
        from capfilt.score.dry_run import dry_run

        return dry_run(run, maker, how)
    if given.engine == "ray":
        from capfilt.score.ray_engine import score_with_ray

        return score_with_ray(run, given.device, how, given.workers)
    return score(run, maker, how)


def _refuse_drift(run, given: Namespace) -> None:
    """ValueError if an option, or a model on disk, is not what the plan says."""
    import dataclasses

    from capfilt.plan import drift
    from capfilt.settings import decided, resolve

    def now(planned: ScoreConfig | ReadConfig):
        names = {f.name for f in dataclasses.fields(planned)}
        return dataclasses.replace(planned, **{k: v for k, v in vars(given).items() if k in names})

    found = drift(
        run, resolve(decided(now(run.config), run.config)), now(run.reading), getattr(given, "part_size", None)
    )
    if found:
        raise ValueError(
            f"{run.where} was planned with other settings: {'; '.join(found)}. Nothing was touched; plan another run "
            "for them"
        )


def _select_options(parser: ArgumentParser) -> None:
    from capfilt.select.policies import SelectConfig

    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--name", required=True, help="of the selection, e.g. half")
    parser.add_argument("--replace", action="store_true", help="an older selection of that name goes")
    _empty_option(parser)
    options.add(parser, SelectConfig, title="what is kept")


def _empty_option(parser: ArgumentParser) -> None:
    parser.add_argument("--allow-empty", action="store_true", help="a selection that keeps no text is no error")


def _select(given: Namespace) -> int:
    from capfilt.run import Run
    from capfilt.select.choose import account_lines, select
    from capfilt.select.policies import SelectConfig

    account = select(Run.open(given.run), given.name, options.build(SelectConfig, given), replace=given.replace,
                     allow_empty=given.allow_empty)  # fmt: skip
    print(*account_lines(account), sep="\n")
    return DONE


def _export_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--select", required=True, metavar="NAME", help="name of the selection")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="an empty folder, or one with this very export")
    parser.add_argument("--replace", action="store_true", help="an older export there goes")
    _empty_option(parser)
    _format_options(parser)


def _format_options(parser: ArgumentParser) -> None:
    what = "tar shards, parquet with images inside, JSON list with images, DataComp uids [wds]"
    parser.add_argument("--format", choices=("wds", "parquet", "json", "uids"), default="wds", help=what)
    parser.add_argument("--shard", type=int, default=10_000, metavar="INT", help="samples per file [10000]")
    parser.add_argument("--together", action="store_true",
                        help="one sample per image with a list of texts, not one per text")  # fmt: skip


def _export(given: Namespace) -> int:
    from capfilt.export import export
    from capfilt.run import Run

    said = export(Run.open(given.run), given.select, given.format, given.to, shard=given.shard, together=given.together,
                  replace=given.replace, allow_empty=given.allow_empty)  # fmt: skip
    print(f"{given.to}: {said['pairs']:,} texts on {said['images']:,} images in {len(said['files']):,} files")
    return DONE


def _report_options(parser: ArgumentParser) -> None:
    from capfilt.report.counts import ReportOptions

    parser.add_argument("run", metavar="RUN")
    options.add(parser, ReportOptions, title="the page")


def _report(given: Namespace) -> int:
    from capfilt.report.counts import ReportOptions
    from capfilt.report.write import report
    from capfilt.run import Run

    print(report(Run.open(given.run), options.build(ReportOptions, given)))
    return DONE


def _run_option(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")


def _verify(given: Namespace) -> int:
    from capfilt.verify import lines, verify

    found = verify(given.run)
    print(*lines(found), sep="\n")
    return found.status()


def _status_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _status(given: Namespace) -> int:
    from capfilt.run import Run
    from capfilt.status import lines, status

    said = status(Run.open(given.run))
    print(json.dumps(said) if given.json else "\n".join(lines(said)))
    return DONE


def _retry_failed(given: Namespace) -> int:
    from capfilt.run import Run
    from capfilt.status import retry_failed

    print(f"{retry_failed(Run.open(given.run))} parts get another chance: run `capfilt score {given.run}`")
    return DONE


def _calibrate_options(parser: ArgumentParser) -> None:
    from capfilt.calibrate.threshold import CalibrateOptions

    parser.add_argument("run", metavar="RUN")
    options.add(parser, CalibrateOptions, title="how the threshold is looked for")


def _calibrate(given: Namespace) -> int:
    from capfilt.calibrate.threshold import CalibrateOptions, calibrate
    from capfilt.run import Run

    how = options.build(CalibrateOptions, given)
    print(*calibrate(Run.open(given.run), how, scorer_maker(how.device)), sep="\n")
    return DONE


def _all_options(parser: ArgumentParser) -> None:
    from capfilt.report.counts import ReportOptions
    from capfilt.score.loop import ScoreOptions
    from capfilt.select.policies import SelectConfig

    _input_options(parser)
    _engine_options(parser)
    parser.add_argument("--name", default="default", help="of the selection [default]")
    parser.add_argument("--to", metavar="FOLDER", help="where to export to [RUN/exports/NAME]")
    _empty_option(parser)
    _format_options(parser)
    _setting_options(parser)
    options.add(parser, SelectConfig, title="what is kept")
    options.add(parser, ReportOptions, skip=("select", "to"), title="the report's page")
    options.add(parser, ScoreOptions, skip=("rank", "world", "allow_damaged"), title="how the work is done")


def _all(given: Namespace) -> int:
    """All verbs in order; a status of 2 for damaged sources does not stop what can be done."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "run is for one process, and WORLD_SIZE says that there are several: plan in one, score in all, and when "
            "all are done select, export, report and verify in one"
        )
    given.extend, given.replace = False, True
    if given.dry_run:
        return _rehearse(given)
    planned = _plan(given)
    given.run, given.select = given.out, given.name
    scored = _score(given)
    if scored not in (DONE, WRONG):
        return scored
    given.to = given.to or os.path.join(given.out, "exports", given.name)
    page = Namespace(**{**vars(given), "to": None})
    for verb, options_of_it in ((_select, given), (_export, given), (_report, page), (_verify, given)):
        status = verb(options_of_it)
        if status != DONE and not (status == FAILED_PARTS and "limit" in given):  # what is left was not asked for
            return status
    return planned or scored


def _rehearse(given: Namespace) -> int:
    """Plan in a folder that is gone afterwards, and say how long the rest would take."""
    with tempfile.TemporaryDirectory() as folder:
        planned = _plan(Namespace(**{**vars(given), "out": folder}))
        return _score(Namespace(**{**vars(given), "run": folder})) or planned


OPTIONS: dict[str, Callable[[ArgumentParser], None]] = {
    "plan": _plan_options,
    "score": _score_options,
    "select": _select_options,
    "export": _export_options,
    "report": _report_options,
    "verify": _run_option,
    "calibrate": _calibrate_options,
    "status": _status_options,
    "retry-failed": _run_option,
    "run": _all_options,
}
ACTIONS: dict[str, Callable[[Namespace], int]] = {
    "plan": _plan,
    "score": _score,
    "select": _select,
    "export": _export,
    "report": _report,
    "verify": _verify,
    "calibrate": _calibrate,
    "status": _status,
    "retry-failed": _retry_failed,
    "run": _all,
}
