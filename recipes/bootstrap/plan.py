"""The stages of the bootstrapping experiment: for each seed the images, models, CapFilt jobs and rows of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip import dist
from blip.checkpoints import checkpoint
from blip.data.settings import SourceConfig
from blip.train.drift import FREE_TO_CHANGE, YOUNGER
from blip.train.settings import TrainConfig
from blip.world.judge import grade as grade_captions
from capfilt.calibrate.grade import grade
from capfilt.run import Run as Job
from eval.captioning import captions_of
from eval.images import Images
from eval.retrieval import Gallery, retrieval
from recipes import caption, command, pretrain, world_capfilt
from recipes import retrieval as retrieving
from recipes.bootstrap.rows import CLEANERS, ROWS, TEACHER, TableRow
from recipes.bootstrap.stages import Stage, Stages
from recipes.building import ModelChoice
from recipes.run import HeldOut

if TYPE_CHECKING:
    from recipes.bootstrap.settings import BootstrapRun, FineTuning

SECONDS = {"tiny": 0.26, "small": 0.94, "base": 12.0, "large": 40.0}
"""Seconds per pre-training step of 64 pairs on 2 CPU cores, by model size; used to estimate the time left."""
CAPTION_COST, FILTER_COST = 0.4, 0.8
"""Cost of a captioner's and a filter's fine-tuning step, in pre-training steps."""
SIZE_OF_PARTS, BATCH = "1024", "128"
"""Rows that a CapFilt job commits together, and rows that it scores together."""


def steps_of(run: BootstrapRun, row: TableRow) -> int:
    """Pre-training steps of a row."""
    return round((run.longer if row.longer else 1.0) * run.train.steps)


def plan(run: BootstrapRun, say: Callable[[str], None] = print) -> Stages:
    """Plan the stages for the rows and seeds of a run; a stage that several rows need stands once."""
    out = Path(run.out)
    world = _plain(run.world)
    stages = [Stage("held-out", lambda folder: _draw_held_out(run, folder), world, cost=1 + 0.001 * run.world.test)]
    for seed in run.seeds:
        stages += _Seed(run, out, seed).stages()
    return Stages(out, stages, say)


class _Seed:
    """The stages of one seed."""

    def __init__(self, run: BootstrapRun, out: Path, seed: int) -> None:
        self.run, self.seed, self.name = run, seed, f"seed-{seed}"
        self.out, self.held_out = out / self.name, out / "held-out"
        self.planned: dict[str, Stage] = {}

    def stages(self) -> list[Stage]:
        drawn = {**_plain(self.run.world), "seed": self.seed}
        self._add("world", self._draw, drawn, (), cost=2 + 0.001 * self.run.world.crawl)
        self._row(TEACHER)  # captioners and filters are fine-tuned from its model
        for name in self.run.rows:
            row = ROWS[name]
            if row.cleaner:
                self._cleaner(row.cleaner)
            self._row(row)
        return list(self.planned.values())

    def _add(self, name: str, work: Callable[[Path], dict], settings: dict, needs: tuple[str, ...], cost: float) -> str:
        """Plan a stage unless it is planned already; returns its full name."""
        full = f"{self.name}/{name}"
        if full not in self.planned:
            self.planned[full] = Stage(full, work, settings, needs, cost)
        return full

    # Images

    def _draw(self, folder: Path) -> dict[str, Any]:
        """Draw the seed's crawl (from an even seed of scenes) and its images with human captions (from an odd one)."""
        world = self.run.world
        how = (world.image_size, world.workers)
        world_capfilt.draw_crawl(folder / "crawl", world.crawl, world.noise, 2 * self.seed, *how)
        world_capfilt.draw_people(folder / "people", "train", world.people, 2 * self.seed + 1, *how)
        return {"crawl": world.crawl, "people": world.people}

    @property
    def crawl(self) -> str:
        return str(self.out / "world" / "crawl" / "*.tar")

    @property
    def people(self) -> list[SourceConfig]:
        return [SourceConfig(str(self.out / "world" / "people" / "train.json"))]

    # Rows

    def _row(self, row: TableRow) -> None:
        """Plan a row: pre-training, fine-tuning for both tasks, evaluation on held-out colour-shape pairs."""
        run, fine = self.run, self.run.fine_tuning
        data = f"{self.name}/capfilt/{row.cleaner}" if row.cleaner else f"{self.name}/world"
        start = f"{self.name}/{TEACHER.name}/pretrain" if row.continued else None
        settings = {
            "row": {"keep": row.keep, "continued": row.continued},
            "model": _plain(run.model, "model."),
            "steps": steps_of(run, row),
            **self._training(),
            "test": {"k": run.k},
        }
        trained = self._add(
            f"{row.name}/pretrain",
            lambda folder: self._pretrain(folder, run.model, steps_of(run, row), row, run.k),
            settings,
            tuple(dict.fromkeys(need for need in (f"{self.name}/world", "held-out", data, start) if need)),
            self._step(run.model) * steps_of(run, row) + 4,
        )
        model = self.out / row.name / "pretrain" / "model"
        recipe = self._by_recipe(world_capfilt.CAPTIONER, fine.captioner, fine.captioner_lr)
        captioner = self._add(
            f"{row.name}/captioner", lambda folder: self._captioner(folder, model, fine, True),
            recipe, (trained,), CAPTION_COST * self._step(run.model) * fine.captioner + 3,
        )  # fmt: skip
        recipe = self._by_recipe(world_capfilt.FILTER, fine.retrieval, fine.retrieval_lr) | {"k": run.k}
        searcher = self._add(
            f"{row.name}/retrieval", lambda folder: self._retrieval(folder, model, fine, True),
            recipe, (trained,), FILTER_COST * self._step(run.model) * fine.retrieval + 4,
        )  # fmt: skip
        self._add(
            f"{row.name}/composition", lambda folder: self._composition(folder.parent), {"k": run.k},
            (captioner, searcher), 6,
        )  # fmt: skip

    def _training(self) -> dict[str, Any]:
        run, train = self.run, _plain(self.run.train, "train.")
        return {
            "seed": self.seed,
            "data": _plain(run.data),
            "people_share": run.people_share,
            "objective": _plain(run.objective),
            "train": {name: value for name, value in train.items() if name not in ("steps", "seed")},
        }

    def _by_recipe(self, config: str, steps: int, lr: float | None = None) -> dict[str, Any]:
        """Settings that decide a fine-tuning run's results, apart from the model it starts from."""
        return {"steps": steps, "lr": lr, "recipe": command.content(config), **self._training()}

    def _step(self, model: ModelChoice) -> float:
        return SECONDS[model.size or "base"] * self.run.train.batch_size / 64

    def _pretrain(self, folder: Path, model: ModelChoice, steps: int, row: TableRow, k: int | None) -> dict[str, Any]:
        """Pre-train from scratch, or continue the first row's model; evaluate without fine-tuning if `k` is given."""
        run = self.run
        if row.cleaner:
            clean = self._clean(row)
            sources, web = world_capfilt.bootstrapped(clean, self.people), world_capfilt.kept(clean)
        else:
            sources, web = [SourceConfig(self.crawl, kind="web"), *self.people], run.world.crawl
        share, people_pairs = run.people_share, run.world.people
        weight = share / (1 - share) * web / people_pairs if web else 1.0
        # The ramp takes the same number of steps in all rows, however many texts they have.
        ramp = run.objective.alpha_ramp_epochs * (run.world.crawl / (1 - share)) / (weight * people_pairs + web)
        *crawled, people = sources
        if row.continued:
            model = ModelChoice(start_from=str(self.out / TEACHER.name / "pretrain" / "model"))
        result, _ = pretrain.pretrain(
            pretrain.PretrainRun(
                out=str(folder),
                model=model,
                data=dataclasses.replace(run.data, sources=[*crawled, dataclasses.replace(people, weight=weight)]),
                objective=dataclasses.replace(run.objective, alpha_ramp_epochs=ramp),
                train=dataclasses.replace(run.train, steps=steps, seed=self.seed),
                held_out=pretrain.HeldOutPairs(_source(self.held_out, "test"), k=k) if k else None,
            )
        )
        return {"steps": result.steps, "pairs": result.samples, **result.metrics}

    def _captioner(self, folder: Path, model: Path, how: FineTuning, measured: bool) -> dict[str, Any]:
        settings = world_capfilt.captioner(folder, model, self.people, self.run.train.batch_size, how.captioner)
        test = HeldOut(_source(self.held_out, "test")) if measured else None
        train = self._fine(settings.train, how.captioner_lr)
        result, _ = caption.caption(dataclasses.replace(settings, train=train, test=test))
        return world_capfilt.tested(result.metrics)

    def _retrieval(self, folder: Path, model: Path, how: FineTuning, measured: bool) -> dict[str, Any]:
        settings = world_capfilt.filterer(folder, model, self.people, self.run.train.batch_size, how.retrieval)
        train = self._fine(settings.train, how.retrieval_lr)
        test = pretrain.HeldOutPairs(_source(self.held_out, "test"), k=self.run.k) if measured else None
        result, _ = retrieving.retrieve(dataclasses.replace(settings, train=train, test=test))
        return {name.removeprefix("test_"): value for name, value in result.metrics.items()}

    def _fine(self, train: TrainConfig, lr: float | None = None) -> TrainConfig:
        ours = self.run.train
        return dataclasses.replace(
            train, seed=self.seed, lr=train.lr if lr is None else lr,
            warmup_steps=min(train.warmup_steps, ours.warmup_steps), save_every=ours.save_every,
            log_every=ours.log_every, precision=ours.precision,
        )  # fmt: skip

    def _composition(self, row: Path) -> dict[str, float]:
        """Evaluate captions and retrieval on images of colour-shape pairs never seen in training."""
        device = "cpu" if dist.on_cpu() else "cuda"
        source, scores = _source(self.held_out, "composition"), {}
        how = command.read(caption.CaptionRun, ["--config", world_capfilt.CAPTIONER, "--out", str(row)])
        model, tokenizer = checkpoint.from_pretrained(row / "captioner" / "model", device=device)
        images = Images.open(source)
        captions = captions_of(model, tokenizer, images, how.decode, prompt=how.data.prompt)
        for grader in caption.graders(images.references):
            scores |= {name: 100 * value for name, value in grader(captions).items()}
        model, tokenizer = checkpoint.from_pretrained(row / "retrieval" / "model", device=device)
        gallery = Gallery.open(source, model.vision.image_size)
        scores |= retrieval(model, tokenizer, *gallery, k=self.run.k, max_tokens=self.run.data.max_tokens)
        return {**scores, "captions": captions}

    # Cleaning

    def _clean(self, row: TableRow) -> Path:
        return self.out / "capfilt" / row.cleaner / "clean" / row.keep

    def _cleaner(self, name: str) -> None:
        """Plan captioner and filter, then the CapFilt job with all its selections."""
        run = self.run
        larger, decode = run.larger, run.cleaning.beam if name == "beam" else run.cleaning.decode
        slower = 1.0
        if name == "larger":
            slower = SECONDS[larger.model.size or "base"] / SECONDS[run.model.size or "base"]
        if name == "larger" and larger.captioner:
            writer, reader, needs = Path(larger.captioner), Path(larger.filter), []
        elif name == "shared":
            writer = reader = self.out / "cleaners" / "shared" / "model"
            needs = [self._shared()]
        else:
            folder = "cleaners/larger" if name == "larger" else "cleaners"
            writer, reader = (self.out / folder / one / "model" for one in ("captioner", "filter"))
            needs = self._larger(folder) if name == "larger" else self._own(folder)
        settings = {
            "decode": decode, "threshold": run.cleaning.threshold, "max_tokens": run.data.max_tokens,
            "seed": self.seed, **({"models": [str(writer), str(reader)]} if not needs else {}),
        }  # fmt: skip
        self._add(
            f"capfilt/{name}",
            lambda folder: self._job(folder, name, writer, reader, decode),
            settings,
            (f"{self.name}/world", *needs),
            slower * (2.0 if name == "beam" else 1.0) * 0.004 * run.world.crawl + 15,
        )

    def _own(self, folder: str) -> list[str]:
        """Plan captioner and filter from the first row's model; returns their names."""
        start = f"{TEACHER.name}/pretrain"
        return self._pair(folder, start, self.run.cleaners, self._step(self.run.model))

    def _larger(self, folder: str) -> list[str]:
        """Plan captioner and filter from a larger model pre-trained on the same crawl; returns their names."""
        larger, k = self.run.larger, self.run.k
        cost, start = self._step(larger.model), f"{folder}/pretrain"
        self._add(
            start, lambda folder: self._pretrain(folder, larger.model, larger.steps, TEACHER, k),
            {"model": _plain(larger.model, "model."), **self._training(), "steps": larger.steps, "k": k},
            (f"{self.name}/world", "held-out"), cost * larger.steps + 8,
        )  # fmt: skip
        return self._pair(folder, start, larger.cleaners, cost)

    def _pair(self, folder: str, start: str, how: FineTuning, cost: float) -> list[str]:
        model, needs = self.out / start / "model", (f"{self.name}/{start}",)
        write, read = how.captioner, how.retrieval
        return [
            self._add(
                f"{folder}/captioner", lambda folder: self._captioner(folder, model, how, False),
                self._by_recipe(world_capfilt.CAPTIONER, write, how.captioner_lr), needs,
                CAPTION_COST * cost * write + 3,
            ),
            self._add(
                f"{folder}/filter", lambda folder: self._retrieval(folder, model, how, False),
                self._by_recipe(world_capfilt.FILTER, read, how.retrieval_lr), needs,
                FILTER_COST * cost * read + 3,
            ),
        ]  # fmt: skip

    def _shared(self) -> str:
        """Plan one model as captioner and filter: all three losses on human captions, for the captioner's steps."""
        steps = self.run.cleaners.captioner
        return self._add(
            "cleaners/shared", lambda folder: self._fine_tune_shared(folder, steps),
            self._by_recipe(world_capfilt.CAPTIONER, steps),
            (f"{self.name}/{TEACHER.name}/pretrain",),
            self._step(self.run.model) * steps + 3,
        )  # fmt: skip

    def _fine_tune_shared(self, folder: Path, steps: int) -> dict[str, Any]:
        start = self.out / TEACHER.name / "pretrain" / "model"
        like = world_capfilt.captioner(folder, start, self.people, self.run.train.batch_size, steps)
        data = dataclasses.replace(like.data, prompt="")  # matching uses no prompt, so neither does captioning
        result, _ = pretrain.pretrain(
            pretrain.PretrainRun(
                out=str(folder), model=like.model, data=data, objective=self.run.objective, train=self._fine(like.train)
            )
        )
        return {"steps": result.steps}

    def _job(self, folder: Path, name: str, writer: Path, reader: Path, decode: str) -> dict[str, Any]:
        """Run CapFilt on the crawl: plan, score, a selection and an export for each row using it, report, verify."""
        run = self.run
        job, threshold = folder / "job", run.cleaning.threshold
        prompt = ["--prompt", ""] if name == "shared" else []
        plan = ["plan", "--input", self.crawl, "--out", job, "--part-size", SIZE_OF_PARTS, "--seed", str(self.seed)]
        world_capfilt.carry_out(*plan, *world_capfilt.models(writer, reader, decode, run.data.max_tokens), *prompt)
        world_capfilt.carry_out("score", job, "--batch", BATCH)
        truths: dict[str, Any] = {}
        for keep in dict.fromkeys(row.keep for row in ROWS.values() if row.cleaner == name):
            world_capfilt.carry_out(
                "select", job, "--name", keep, "--replace", "--allow-empty", *CLEANERS[keep](threshold)
            )
            world_capfilt.carry_out("export", job, "--select", keep, "--to", folder / "clean" / keep, "--allow-empty")
            truths[keep] = _kept_truth(Job.open(str(job)), keep, folder / "clean" / keep)
        world_capfilt.carry_out("report", job, "--select", "both", "--no-blur")
        world_capfilt.carry_out("verify", job)
        return truths


def _kept_truth(job: Job, keep: str, clean: Path) -> dict[str, Any]:
    """Size of a selection, and how much of it is right; in percent except AUCs and numbers of texts."""
    kinds = grade(job, keep)
    every, kept = world_capfilt.synthetic(job, keep)
    wrong = kinds["wrong"]
    truth = {
        "texts": world_capfilt.kept(clean),
        "web": (kinds["right"].kept if "right" in kinds else 0) + wrong.kept,
        "synthetic": len(kept),
        "noise_kept": 100 * wrong.kept / max(1, wrong.texts),
        "web_wrong": 100 - world_capfilt.web_right(kinds, 1),
        "synthetic_wrong_before": _percent_wrong(every, "true"),
        "synthetic_rejected": 100 - 100 * len(kept) / max(1, len(every)),
        **world_capfilt.aucs(kinds),
        "kinds": {kind: k._asdict() for kind, k in kinds.items()},
    }
    if kept:
        truth |= {
            "synthetic_wrong": _percent_wrong(kept, "true"),
            "synthetic_claims_wrong": _percent_wrong(kept, "precision"),
        }
    return truth


def _percent_wrong(verdicts: list, name: str) -> float:
    """Percentage of texts that say something false (`name` is "true"), or of false claims ("precision")."""
    return 100 - 100 * grade_captions(verdicts)[name]


def _draw_held_out(run: BootstrapRun, folder: Path) -> dict[str, Any]:
    world = run.world
    for split, count in (("test", world.test), ("composition", world.composition)):
        world_capfilt.draw_people(folder, split, count, 0, world.image_size, world.workers)
    return {"test": world.test, "composition": world.composition}


def _source(folder: Path, split: str) -> SourceConfig:
    return SourceConfig(str(folder / f"{split}.json"))


def _plain(settings: Any, section: str = "") -> dict[str, Any]:
    """Settings of a section that decide results; those unknown to older runs are left out at their old values."""
    decisive = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE_TO_CHANGE}
    younger = {name.removeprefix(section): value for name, value in YOUNGER.items() if name.startswith(section)}
    return {name: value for name, value in decisive.items() if name not in younger or value != younger[name]}
