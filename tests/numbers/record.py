"""Record the numbers that a redesign must not change: losses, weights, scores, texts, tables of CapFilt.

    python -m tests.numbers.record before.json                                # of this checkout
    python -m tests.numbers.record before.json --tree ../base --folder before # of another; its runs stay in before/
    python -m tests.numbers.record some.json --only pretrain capfilt

Everything is asked for as a user would, by the four programs, `blip.load` and the files that they leave, so that the
same recorder reads two versions of the code whose modules lie elsewhere. TINY models, synthetic world, one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = "recipes/configs/"
STEPS, SHORT, BATCH, SAVED = 6, 3, 8, 3
"""Steps of a run, and of one in the short form; pairs in each; steps before its checkpoint."""
LIBRARIES = ("torch", "torch._dynamo", "torchvision", "timm", "transformers", "tokenizers", "accelerate", "datasets")
LIBRARIES += ("transformers.models.auto.tokenization_auto", "pyarrow.parquet")
"""Imported once, for all processes: what takes seconds."""
RENAMED: dict[str, str] = {}
"""Arguments that have another name since: they are given the new way where the old one is refused with status 2."""
LOG = "log.txt"
SHORT_FORM = ("pretrain", "retrieval", "caption", "vqa", "nlvr", "dialogue", "features", "texts")


class Failed(Exception):
    """A program ended as it should not."""


def fork(work: Callable[[], Any], log: Path, **environment: str) -> int:
    """Start `work` in a process of its own, which has this one's imports, and return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        status = work() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ended(pid: int) -> int:
    """Wait for a process; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


class Recorder:
    """Runs programs of the checkout that this process imports, and reads what they leave."""

    def __init__(self, tree: Path, folder: Path, models: Path, short: bool = False) -> None:
        self.folder, self.models, self.short = folder, models, short
        self.programs = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]
        self.results: dict[str, Any] = {}
        self.log = folder / LOG

    # Programs ---------------------------------------------------------------------------------------------------------

    def start(self, program: str, args: Sequence[Any], log: Path | None = None, **environment: str) -> int:
        module, _, function = self.programs[program].partition(":")

        def work() -> Any:
            sys.argv = [program, *map(str, args)]
            return getattr(importlib.import_module(module), function)()

        return fork(work, log or self.log, **environment)

    def run(self, program: str, *args: Any, world: int = 1) -> str:
        """Run a program, in `world` processes as a launcher starts them, and return what it said."""
        status = self._run(program, args, world)
        if status == 2 and any(str(arg) in RENAMED for arg in args):
            args = tuple(RENAMED.get(str(arg), arg) for arg in args)
            status = self._run(program, args, world)
        log = self.log.read_text(errors="replace")
        if status:
            raise Failed(f"{program} {' '.join(map(str, args))}\nended with status {status}:\n{log[-3000:]}")
        return log

    def _run(self, program: str, args: Sequence[Any], world: int) -> int:
        if world == 1:
            return ended(self.start(program, args))
        port, pids = free_port(), []
        for rank in range(world):
            launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": "2"}
            launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = self.log.with_name(f"log-{rank}.txt") if rank else self.log
            pids.append(self.start(program, args, log, **launcher))
        return max(map(abs, map(ended, pids)))

    def in_child(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, by way of JSON, from a process of its own."""
        answer = self.folder / "answer.json"
        status = ended(fork(lambda: answer.write_text(json.dumps(work())) and None, self.log))
        if status:
            raise Failed(f"ended with status {status}:\n{self.log.read_text()[-3000:]}")
        return json.loads(answer.read_text())

    # Training ---------------------------------------------------------------------------------------------------------

    def train(self, name: str, recipe: str, config: str, *args: Any, world: int = 1) -> dict[str, Any]:
        """Carry out a recipe's run in the folder `name`; its losses, scores and weights."""
        self.run("blip-recipe", *self.training(name, recipe, config, *args), world=world)
        return self.trained(name)

    def training(self, name: str, recipe: str, config: str, *args: Any) -> list[Any]:
        """The command line of a short run, whose held-out sets are looked at once, at the end."""
        short = {
            "steps": SHORT if self.short else STEPS,
            "batch_size": BATCH,
            "log_every": 1,
            "warmup_steps": 2,
            "save_every": SAVED,
        }
        short |= {"eval_every": 0, "eval_each_epoch": "false", "precision": "float32", "optimizer": "adamw"}
        given = [word for option, value in short.items() for word in (f"--train.{option}", value)]
        return [recipe, "--config", f"{CONFIGS}{config}.yaml", "--out", self.folder / name, *given, *args]

    def trained(self, name: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        outcome = {
            "losses": {str(line["step"]): line["losses"] for line in lines if "losses" in line},
            "scores": {str(line["step"]): line["eval"] for line in lines if "eval" in line},
            "weights": tensors(self.folder / name / "model"),
        }
        results = self.folder / name / "results.json"
        return outcome | ({"results": json.loads(results.read_text())} if results.exists() else {})

    def world(self, name: str = "world", train: int = 64, held_out: int = 16) -> list[Any]:
        return ["--world.folder", self.folder / name, "--world.train", train, "--world.held_out", held_out]

    def longer(self, steps: int) -> list[Any]:
        """Options of a run whose model has to say more than a word."""
        return [] if self.short else ["--train.steps", steps]

    def sources(self, *files: dict[str, str] | str) -> list[str]:
        """The option with the training files, by their names in the folder."""
        rows = [{"path": one} if isinstance(one, str) else one for one in files]
        return ["--data.sources", json.dumps([{k: f"{self.folder}/{v}" for k, v in row.items()} for row in rows])]

    def held_out(self, *names: str, **more: str) -> list[str]:
        """Options with held-out files: path and further ones of the source."""
        return [
            word
            for name in names
            for key, file in more.items()
            for word in (
                f"--{name}.source.{key}",
                f"{self.folder}/{file.format({'validation': 'val'}.get(name, 'test'))}",
            )
        ]

    def pretraining(self, name: str, *args: Any) -> list[Any]:
        given = [*self.world(), *self.sources("world/train.json"), *self.held_out("held_out", path="world/{}.json")]
        return self.training(
            name, "pretrain", "pretrain_world", *given, "--held_out.k", 4, "--objective.queue_size", 24, *args
        )

    def pretrain(self, name: str, *args: Any, world: int = 1) -> dict[str, Any]:
        self.run("blip-recipe", *self.pretraining(name, *args), world=world)
        return self.trained(name)

    def resumed(self) -> dict[str, Any]:
        """Pre-training that is killed after its first checkpoint and goes on: equal to that which was not."""
        metrics = self.folder / "resumed" / "metrics.jsonl"
        for _ in range(5):
            shutil.rmtree(metrics.parent, ignore_errors=True)
            pid = self.start("blip-recipe", self.pretraining("resumed"))
            while not (metrics.exists() and metrics.read_bytes().count(b"\n") > SAVED):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            if ended(pid) == -signal.SIGKILL:
                results = self.pretrain("resumed")
                return self.agree("a run that was killed and one that was not", results, self.results["pretrain"])
        raise Failed(f"the run was over before it could be killed:\n{self.log.read_text()[-3000:]}")

    def agree(self, what: str, one: Any, other: Any) -> Any:
        """Return `one`, which has to equal `other`."""
        if one != other:
            raise Failed(f"{what} differ (--folder keeps the runs)")
        return one

    def fine(self, name: str, recipe: str, config: str, *args: Any) -> dict[str, Any]:
        start = [] if "--model.start_from" in args else ["--model.start_from", self.folder / "pretrain" / "model"]
        return self.train(name, recipe, config, *start, *args)

    def retrieval(self, name: str = "retrieval", *args: Any) -> dict[str, Any]:
        held_out = self.held_out("validation", "test", path="world/{}.json")
        given = [*self.world(), *self.sources("world/train.json"), *held_out, *args]
        if not self.short:  # Muon multiplies in bfloat16, and its weights differ between processors in the third digit
            given += ["--train.optimizer", "muon", *self.longer(20)]
        return self.fine(name, "retrieval", "filter_world", *given)

    def queued(self) -> dict[str, Any]:
        """Fine-tuning for retrieval with queues, whose first rows are a function of the seed for new weights only."""
        new = ["--model.start_from", "null", "--model.size", "tiny", "--model.tokenizer", "world"]
        return self.retrieval("queued", *new, "--model.image_size", 63, "--model.patch_size", 21,
                              "--objective.queue_size", 24)  # fmt: skip

    def caption(self) -> dict[str, Any]:
        held_out = self.held_out("validation", "test", path="world/{}.json")
        given = [*self.world(), *self.sources("world/train.json"), *held_out, *self.longer(40)]
        return self.fine("caption", "caption", "caption_world", *given)

    def vqa(self) -> dict[str, Any]:
        files = {"path": "world/questions-{}.json", "annotations": "world/annotations-{}.json"}
        train = {key: file.format("train") for key, file in files.items()}
        held_out = self.held_out("validation", "test", **files)
        return self.fine("vqa", "vqa", "vqa_world", *self.world(), *self.sources(train), *held_out, *self.longer(20))

    def nlvr(self, name: str = "nlvr", *args: Any) -> dict[str, Any]:
        held_out = self.held_out("validation", "test", path="pairs/{}.json")
        given = [*self.world("pairs", 16, 4), *self.sources("pairs/train.json"), *held_out]
        return self.fine(name, "nlvr", "nlvr_world", *given, *args)

    def dialogue(self) -> dict[str, Any]:
        held_out = self.held_out("validation", "test", path="talk/{}.json", relevance="talk/{}-dense.json")
        given = [*self.world("talk", 32, 4), *self.sources("talk/train.json"), *held_out]
        given += ["--validation.limit", 1, "--test.limit", 2]
        return self.fine("dialogue", "dialogue", "visdial_world", *given)

    def random(self) -> dict[str, Any]:
        """Pre-training with all that is drawn at random, read by worker processes."""
        drawn = ["--data.workers", 2, "--data.augment_ops", 2, "--data.crop_scale_min", 0.3, "--data.flip", 0.5]
        drawn += ["--model.drop_path", 0.2, "--model.patch_drop", 0.3, "--model.checkpoint", "true"]
        return self.pretrain(
            "random", *drawn, "--objective.teacher_dropout", "true", "--objective.alpha_ramp_epochs", 1
        )

    def stream(self) -> dict[str, Any]:
        """Pre-training that streams what CapFilt has exported."""
        return self.pretrain("stream", *self.sources("clean"), "--data.streaming", "true", "--objective.queue_size", 0)

    # Trained models at work -------------------------------------------------------------------------------------------

    def images(self, count: int = 6) -> list[str]:
        return [str(path) for path in sorted((self.folder / "world/images/test").iterdir())[:count]]

    def features(self) -> dict[str, Any]:
        """Embeddings, cosines and matches of images and texts, by `blip.load`."""

        def work() -> dict[str, Any]:
            import blip

            features = blip.load(self.folder / "retrieval" / "model")
            rows = json.loads((self.folder / "world/test.json").read_text())
            texts = [row["caption"][0] for row in rows[:4]]
            match = features.match(self.images(), texts)
            results = {"images": features.embed_image(self.images()), "texts": features.embed_text(texts)}
            results |= {
                "grounded": features.ground(self.images(4), texts),
                "cosines": match.itc,
                "logits": match.logits,
            }
            return {name: value.tolist() for name, value in results.items()}

        return self.in_child(work)

    def commands(self) -> dict[str, Any]:
        """Answers of the sub-commands of `blip`."""
        retrieval, caption = ("--model", self.folder / "retrieval/model"), ("--model", self.folder / "caption/model")
        shown = self.folder / "shown"
        shutil.rmtree(shown, ignore_errors=True)
        shutil.copytree(self.folder / "world/images/test", shown)
        vqa = (shown, "what colour is the circle?", "--model", self.folder / "vqa/model", "--top", 3)
        lines = {
            "match": ("match", shown, "a red circle", "a small blue square", *retrieval),
            "search": ("search", shown, "a red circle", "--rerank", 4, *retrieval),
            "classify": ("classify", shown, "--classes", "circle,square,star", "--top", 3, *retrieval),
            "vqa": ("vqa", *vqa),
            "vqa generate": ("vqa", *vqa, "--method", "generate"),
            "greedy": ("caption", shown, "--preset", "greedy", *caption),
            "beam": ("caption", shown, "--preset", "caption_2022", "--num", 2, *caption),
            "nucleus": ("caption", shown, "--preset", "nucleus", "--num", 2, "--seed", 5, *caption),
            "capfilt": ("caption", shown, "--preset", "capfilt_2022", *caption),
        }
        results: dict[str, Any] = {}
        for name, args in lines.items():
            out = self.folder / "answers" / f"{name}.jsonl"
            out.parent.mkdir(exist_ok=True)
            out.unlink(missing_ok=True)
            self.run("blip", *args, "--json", "--out", out)
            answers = [json.loads(line) for line in out.read_text().splitlines()]
            paths = [Path(one.pop("path")).name for one in answers]
            results[name] = {"paths": paths, "answers": answers}
        strip = self.folder / "explained.png"
        self.run("blip", "explain", self.images()[0], "a red circle", "--out", strip, *retrieval)
        return results | {"explain": pixels(strip)}

    def evaluations(self) -> dict[str, Any]:
        """What `blip-eval` says of the models that an earlier recording has left, or this one."""
        return {name: self.evaluate(name, *args) for name, args in self._evaluations().items()}

    def _evaluations(self) -> dict[str, list[Any]]:
        pairs = self.held_out("test", path="world/{}.json")
        questions = self.held_out("test", path="world/questions-{}.json", annotations="world/annotations-{}.json")
        dialogues = self.held_out("test", path="talk/{}.json", relevance="talk/{}-dense.json")
        lines = {
            "retrieval": ["retrieval", *pairs, "--k", 4],
            "pretrain": ["retrieval", *pairs, "--k", 16],
            "caption": ["captioning", *pairs, "--meteor", "false", "--spice", "false", "--tokenizer", "python"],
            "vqa": ["vqa", *questions],
            "vqa_generate": ["vqa", *questions, "--method", "generate"],
            "nlvr": ["nlvr2", *self.held_out("test", path="pairs/{}.json")],
            "dialogue": ["visdial", *dialogues],
        }
        return {name: [str(word).replace("--test.source", "--source") for word in line] for name, line in lines.items()}

    def evaluate(self, name: str, task: str, *args: str) -> dict[str, Any]:
        out = self.folder / "evaluations" / name
        shutil.rmtree(out, ignore_errors=True)
        self.run("blip-eval", task, "--model", self.models / name.partition("_")[0] / "model", "--out", out, *args)
        scores = json.loads((out / "scores.json").read_text())
        scores = {key: value for key, value in scores.items() if key not in ("model", "source", "answers", "decode")}
        files = [path for path in sorted(out.iterdir()) if path.suffix in (".json", ".csv")]
        return {"scores": scores} | {path.name: sha(path) for path in files if path.name != "scores.json"}

    def classification(self) -> dict[str, Any]:
        """Zero-shot classification of images that stand in folders by their first caption's last word."""
        folder = self.folder / "classes"
        shutil.rmtree(folder, ignore_errors=True)
        for row in json.loads((self.folder / "world/test.json").read_text()):
            image = self.folder / "world" / row["image"]
            into = folder / row["caption"][0].split()[-1]
            into.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, into)
        return self.evaluate("retrieval_classes", "classification", "--source", folder)

    def continued(self) -> dict[str, Any]:
        """Fine-tuning that goes on from a task's model, whose tensors are all there."""
        return self.nlvr("continued", "--model.start_from", self.models / "nlvr" / "model")

    # CapFilt ----------------------------------------------------------------------------------------------------------

    def plan(self, job: str, input: str, *args: Any) -> None:
        shutil.rmtree(self.folder / job, ignore_errors=True)
        models = ["--captioner", self.models / "caption/model", "--filter", self.models / "retrieval/model"]
        self.run("capfilt", "plan", "--input", self.folder / input, "--out", self.folder / job, *models,
                 "--part-size", 16, "--max-length", 20, "--max-tokens", 40, *args)  # fmt: skip

    def score(self, job: str, world: int = 1) -> dict[str, Any]:
        self.run("capfilt", "score", self.folder / job, "--decode-workers", 0, world=world)
        return self.annotations(job)

    def annotations(self, job: str) -> dict[str, Any]:
        """Every column of a job's table by its hash; scores and synthetic texts as they are."""
        import pyarrow.parquet

        files = sorted((self.folder / job / "parts").rglob("*.parquet"))
        rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
        rows.sort(key=lambda row: (row["source_uri"], row["source_row"]))
        hidden = ("attempt", "worker", "device", "seconds", "part_id")
        shown = ("syn_text", "syn_logprob", "itm_web", "itm_syn", "itc_web", "itc_syn")
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in hidden}
        hashes = {name: digest(json.dumps(values).encode()) for name, values in columns.items()}
        return {"rows": len(rows), "columns": hashes, "values": {name: columns[name] for name in shown}}

    def capfilt(self) -> dict[str, Any]:
        """Scores of a job, what policies select of it, and exports in every format."""
        job = self.folder / "job"
        self.plan("job", "world/train.json")
        results: dict[str, Any] = {"annotations": self.score("job"), "selections": {}, "exports": {}}
        cosines = sorted(value for row in results["annotations"]["values"]["itc_web"] for value in row)
        middle = sorted(value for row in results["annotations"]["values"]["itm_web"] for value in row)[
            len(cosines) // 2
        ]
        for name, args in {
            "half": ("--itm", middle),
            "best": ("--policy", "rank-k", "--k", 2, "--itm", cosines[0]),
            "web": ("--policy", "web-else-syn", "--itm", middle),
            "fraction": ("--policy", "fraction", "--fraction", 0.3, "--by", "margin"),
            "table": ("--policy", "threshold-table", "--itm-web", middle, "--itm-syn", middle, "--rules", "junk"),
        }.items():
            self.run("capfilt", "select", job, "--name", name, *args)
            results["selections"][name] = self.selection("job", name)
        for format in ("wds", "parquet", "json", "uids"):
            to = self.folder / ("clean" if format == "wds" else f"clean-{format}")
            self.run("capfilt", "export", job, "--select", "half", "--to", to, "--format", format, "--replace")
            success = json.loads((to / "_SUCCESS").read_bytes())
            results["exports"][format] = {
                "pairs": success["pairs"],
                "images": success["images"],
                "content": content(to),
            }
        self.run("capfilt", "report", job, "--select", "half")
        self.run("capfilt", "verify", job)
        results["null"] = self.run("capfilt", "calibrate", job, "--method", "null", "--count", 64).splitlines()
        results["null"] = [line for line in results["null"] if str(self.folder) not in line]
        return results

    def selection(self, job: str, name: str) -> dict[str, str]:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(self.folder / job / "selections" / name / "texts.parquet").to_pylist()
        for row in rows:
            del row["part_id"]
        rows.sort(key=lambda row: json.dumps([row["sample_id"], row["text_source"], row["text_index"]]))
        return {"rows": len(rows), "kept": sum(row["kept"] for row in rows), "hash": digest(json.dumps(rows).encode())}

    def two_workers(self) -> dict[str, Any]:
        """The same job, scored by two processes that share its parts: equal to that of one."""
        self.plan("job-2", "world/train.json")
        results = self.score("job-2", world=2)
        return self.agree("a job of two workers and one of one", results, self.results["capfilt"]["annotations"])

    def texts(self) -> dict[str, Any]:
        """Texts and their log-probabilities by every preset of decoding."""
        results = {}
        for preset in ("greedy", "caption_2022", "nucleus", "capfilt_2022")[: 1 if self.short else None]:
            several = ["--captions", 2] if preset != "greedy" else []
            self.plan(f"job-{preset}", "world/val.json", "--decode", preset, *several)
            results[preset] = self.score(f"job-{preset}")["values"]
        return results

    # Models on disk ---------------------------------------------------------------------------------------------------

    def layouts(self) -> dict[str, Any]:
        """Models in the layouts of others, and back again: every tensor there and back."""
        results = {}
        for name, to, use in (
            ("pretrain", "original", "pretraining"),
            ("caption", "original", "captioning"),
            ("caption", "transformers", "captioning"),
            ("retrieval", "transformers", "matching"),
            ("vqa", "original", "vqa"),
            ("vqa", "transformers", "vqa"),
        ):
            out = self.folder / "layouts" / f"{name}-{to}"
            shutil.rmtree(out, ignore_errors=True)
            back = out.with_name(f"{out.name}-back")
            shutil.rmtree(back, ignore_errors=True)
            out.parent.mkdir(exist_ok=True)
            source = self.models / name / "model"
            self.run("blip", "convert", source, out, "--to", to, "--use", use)
            there = [path for path in out.iterdir() if path.suffix in (".pth", ".safetensors")]
            again = there[0] if to == "original" else out
            self.run("blip", "convert", again, back, *(("--tokenizer", source) if to == "original" else ()))
            returned, whole = tensors(back), Counter(tensors(source).values())
            changed = [
                one for one in Counter(returned.values()) - whole if " [] " not in one
            ]  # temperatures stay behind
            self.agree(f"the tensors of {name} and those back from {to}", changed, [])
            results[f"{name} {to}"] = {
                "there": self.in_child(lambda file=there[0]: state(file)),
                "back": {"weights": returned},
            }
        return results


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def sha(path: Path) -> str:
    return digest(path.read_bytes())


def tensors(folder: Path) -> dict[str, str]:
    """Type, shape and hash of every tensor of a model folder, read from the bytes of its file."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    results = {}
    for name, one in sorted(header.items()):
        first, last = (start + at for at in one["data_offsets"])
        results[name] = f"{one['dtype']} {one['shape']} {digest(raw[first:last])}"
    return results


def state(file: Path) -> dict[str, str]:
    """The same of a file in another's layout."""
    if file.suffix == ".safetensors":
        return tensors(file.parent)
    import torch

    whole = torch.load(file, map_location="cpu", weights_only=True)
    return {
        name: f"{value.dtype} {list(value.shape)} {digest(value.contiguous().numpy().tobytes())}"
        for name, value in sorted(whole.get("model", whole).items())
    }


def pixels(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return f"{image.size} {digest(image.convert('RGB').tobytes())}"


def content(folder: Path) -> dict[str, str]:
    """Hashes of an export's files; of a tar, of its members, and of a parquet file, of its rows."""
    results = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = [(one.name, digest(tar.extractfile(one).read())) for one in tar]
            results[path.name] = digest(json.dumps(members).encode())
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            results[path.name] = digest(repr(pyarrow.parquet.read_table(path).to_pylist()).encode())
        elif path.is_file() and path.name != "_SUCCESS":
            results[str(path.relative_to(folder))] = sha(path)
    return results


def sections(recorder: Recorder) -> dict[str, Callable[[], Any]]:
    """What can be recorded, each after what it builds on."""
    r = recorder
    return {
        "pretrain": lambda: r.pretrain("pretrain"),
        "retrieval": r.retrieval,
        "queued": r.queued,
        "caption": r.caption,
        "vqa": r.vqa,
        "nlvr": r.nlvr,
        "dialogue": r.dialogue,
        "features": r.features,
        "commands": r.commands,
        "evaluations": r.evaluations,
        "classification": r.classification,
        "continued": r.continued,
        "texts": r.texts,
        "capfilt": r.capfilt,
        "two_workers": r.two_workers,
        "layouts": r.layouts,
        "accumulated": lambda: r.pretrain("accumulated", "--train.accumulate", 2, "--train.batch_size", 4),
        "two_processes": lambda: r.pretrain("two_processes", "--train.batch_size", 4, world=2),
        "negatives_everywhere": lambda: r.pretrain(
            "negatives_everywhere", "--train.batch_size", 4, "--objective.negatives_all_ranks", "true", world=2
        ),
        "bfloat16": lambda: r.pretrain("bfloat16", "--train.precision", "bfloat16"),
        "random": r.random,
        "stream": r.stream,
        "resumed": r.resumed,
    }


NEEDS = {
    **dict.fromkeys(("retrieval", "caption", "vqa", "nlvr", "dialogue", "resumed"), ("pretrain",)),
    "features": ("retrieval",),
    "commands": ("retrieval", "caption", "vqa"),
    "evaluations": ("retrieval", "caption", "vqa", "nlvr", "dialogue"),
    "classification": ("retrieval",),
    "continued": ("nlvr",),
    "texts": ("retrieval", "caption"),
    "capfilt": ("retrieval", "caption"),
    "two_workers": ("capfilt",),
    "layouts": ("retrieval", "caption", "vqa"),
    "stream": ("capfilt",),
}
"""Sections by what they build on."""


def wanted(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those sections and all that they build on, in order."""
    if wrong := set(names) - set(known):
        raise SystemExit(f"error: there is no {', '.join(sorted(wrong))}; give some of {', '.join(known)}")

    def whole(name: str) -> Iterator[str]:
        for need in NEEDS.get(name, ()):
            yield from whole(need)
        yield name

    needed = {one for name in names or known for one in whole(name)}
    return [name for name in known if name in needed]


def machine() -> dict[str, Any]:
    """What bits depend on, beside the code."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = [sorted({line for line in lines if line.startswith(f"{name}\t")}) for name in ("model name", "flags")]
    able = torch.cpu.get_capabilities()
    return {
        "processor": facts[0][0].partition(": ")[2] if facts[0] else platform.processor(),
        "instructions": digest(json.dumps(facts[1]).encode()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")),
        **{name: importlib.import_module(name).__version__ for name in ("torch", "timm", "transformers")},
        "python": platform.python_version(),
    }


def record(
    tree: Path, folder: Path, models: Path | None = None, only: Sequence[str] = (), short: bool = False
) -> dict[str, Any]:
    """Record sections, all by default, in this process, which imports `tree`; files go to `folder`."""
    if (folder / LOG).exists():  # an earlier recording, whose runs would be gone on with
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise Failed(f"{folder} is not empty, and no recording has made it: give another --folder")
    recorder = Recorder(tree, folder, models or folder, short)
    known = sections(recorder)
    facts = json.loads(json.dumps(recorder.in_child(machine)))
    for name in wanted(SHORT_FORM if short else only, list(known)):
        if name == "bfloat16" and not facts["bfloat16"]:
            print("bfloat16: this processor does not multiply it", file=sys.stderr)
            continue
        began = time.monotonic()
        recorder.results[name] = known[name]()
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    results = {"machine": facts, **recorder.results}
    return short_form(results) if short else results


def short_form(results: dict[str, Any]) -> dict[str, Any]:
    """What other processors compute nearly the same: no hash, no text and nothing that is counted."""
    texts = results["texts"]["greedy"]
    kept: dict[str, Any] = {"machine": results["machine"]}
    for name in SHORT_FORM[:6]:
        kept[name] = {
            step: {loss: value for loss, value in losses.items() if not re.search("accuracy|recall|grad_norm", loss)}
            for step, losses in results[name]["losses"].items()
        }
    kept["features"] = {name: results["features"][name] for name in ("cosines", "logits")}
    kept["texts"] = {name: texts[name][:4] for name in ("itm_web", "itc_web")}
    return kept


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("tests.numbers.record", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="file to write, .json")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to record (default: this one)")
    parser.add_argument("--folder", type=Path, help="where its runs are kept (default: nowhere)")
    parser.add_argument("--models", type=Path, help="the --folder of another recording: its models are opened as well")
    parser.add_argument("--only", nargs="+", default=[], help="sections, with what they build on")
    parser.add_argument("--short", action="store_true", help="what the suite compares, of shorter runs")
    given = parser.parse_args(args)
    tree, out = given.tree.resolve(), given.out.resolve()
    if os.environ.get("PYTHONPATH") != str(tree) or Path.cwd() != tree or not sys.flags.safe_path:
        paths = [word for name in ("folder", "models") if (path := getattr(given, name))
                 for word in (f"--{name}", str(path.resolve()))]  # fmt: skip
        only = ["--only", *given.only] if given.only else []
        fixed = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        fixed |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
        os.chdir(tree)
        line = [sys.executable, "-P", str(Path(__file__).resolve()), str(out), "--tree", str(tree), *paths, *only]
        line += ["--short"] * given.short
        os.execve(sys.executable, line, {**os.environ, **fixed})
    for library in LIBRARIES:
        importlib.import_module(library)
    scratch = Path(tempfile.mkdtemp())  # no TemporaryDirectory: a program that ends would remove it, as it is a fork
    try:
        results = record(tree, given.folder or scratch, given.models, given.only, given.short)
    except Failed as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
