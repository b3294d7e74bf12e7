"""README.md and docs/: what they tell a reader to type works, what they link to is there, and the reference builds.

`docs_commands` finds the commands and reads them by their own parsers. The pages for newcomers are walked for real, in
a temporary folder, with fewer images and steps than they say.
"""

import ast
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from docs_commands import PAGES, ROOT, Command, Unreadable, blocks, commands, commands_of, not_there, read, simple
from PIL import Image
from stub_run import HERE, SEARCHED, Zygote
from torch.utils.flop_counter import FlopCounterMode

import blip
from benchmarks import cost
from blip.models.blip import Blip
from blip.models.presets import BASE, LARGE, TINY
from blip.models.settings import BlipConfig
from blip.models.vqa import Vqa
from blip.world import files as world_files
from blip.world.judge import judge
from blip.world.scene import scene_of
from recipes import command as recipes_command

DOCS = ROOT / "docs"
SITE = [*PAGES, *sorted((DOCS / "api").glob("*"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def of(name: str) -> list[Command]:
    return commands_of(ROOT / name)


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_its_program_understands(name):
    problems = []
    for command in of(name):
        try:
            read(command)
        except Unreadable as error:
            problems.append(f"{command}\n    {error}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_command_needs_is_there_or_said(name):
    """A stale mark is as wrong as a missing one."""
    for command in of(name):
        missing = not_there(command)
        if command.needs is None:
            assert not missing, f"{command}\nneeds {', '.join(sorted(missing))}: say so behind it, as `# needs COCO`"
        else:
            assert missing, f"{command}\nhas all that it needs; the mark can go"


def test_enough_commands_are_found():
    """The checks above are empty if nothing is found; these pages have many."""
    counts = {name: len(of(name)) for name in NAMES}
    for name, least in {"README.md": 15, "docs/own_crawl.md": 18, "docs/finetuning.md": 9, "docs/vqa.md": 5}.items():
        assert counts[name] >= least, counts
    assert {command.needs for command in commands() if command.needs} >= {"COCO", "NLVR2", "VisDial", "VQA v2"}


@pytest.mark.parametrize(
    "text",
    [
        "python -m recipes.caption --config recipes/configs/caption_world.yaml --train.step 3",
        "python -m recipes.caption --config recipes/configs/gone.yaml",
        "torchrun --nproc 8 --no-such-option -m recipes.pretrain --config recipes/configs/pretrain_world.yaml",
        "accelerate launch --no_such_option -m recipes.pretrain --config recipes/configs/pretrain_world.yaml",
        "accelerate launch recipes.pretrain --config recipes/configs/pretrain_world.yaml",
        "python -m eval captioning --modle runs/x --out runs/y",
        "python -m eval captoining --help",
        "blip-eval captioning --modle runs/x --out runs/y",
        "blip-eval captoining --help",
        "blip-recipe caption --config recipes/configs/caption_world.yaml --train.step 3",
        "blip-recipe captoin --help",
        "python -m capfilt select runs/x --policy blop --name a",
        "blip caption photo.jpg --modle runs/x",
        "blip paint photo.jpg",
        "python -m blip.world.files --outt runs/x",
        "python -m benchmarks.caption --rounds many",
        "make coffee",
        "pip install -e '.[coffee]'",
        "pip install 'openblip[demo]'",
        "pip install 'gradio>=1'",
    ],
)
def test_a_wrong_command_is_noticed(text):
    with pytest.raises(Unreadable):
        read(Command("x.md", 1, text, None, False))


def test_what_is_not_there_is_noticed():
    def of_line(text: str) -> set[str]:
        return not_there(Command("x.md", 1, text, None, False))

    assert of_line("blip caption photo.jpg --model runs/nobody_made_this/model") == {"runs/nobody_made_this/model"}
    assert of_line("blip caption photo.jpg --model runs/caption_world/model") == set()
    assert of_line("blip caption holiday/1.jpg --model runs/caption_world/model") == {"holiday/1.jpg"}
    assert "DATA/coco_karpathy_train.json" in of_line(
        "python -m recipes.caption --config recipes/configs/caption_coco.yaml"
    )


# Links and snippets --------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    return "\n".join(text for _, language, text in blocks(page.read_text()) if language is None)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as the web pages of repositories make them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower()) for head in heads]
    return {head.strip().replace(" ", "-") for head in plain}


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page)) if page.suffix == ".md" else ""
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)", text, re.M)


@pytest.mark.parametrize("page", SITE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert target.exists(), f"{page.name}: {link} is not there"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"
    assert "](<" not in prose(page) if page.suffix == ".md" else True


def test_every_page_is_reached_from_the_map():
    seen, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix not in (".md", ".rst"):
            continue
        seen.add(page)
        todo += [(page.parent / link.split("#")[0]).resolve() for link in links(page) if "//" not in link]
    pages = {page for page in SITE if page.is_relative_to(DOCS) and page.suffix in (".md", ".rst")}
    assert pages <= seen, f"not reached: {sorted(str(page.relative_to(ROOT)) for page in pages - seen)}"


def test_tests_that_the_map_names_are_there():
    """What is often asked for has a path that a test walks."""
    files = {path.stem: path.read_text() for path in HERE.rglob("*.py")}
    for name in re.findall(r"\btest_\w+", (DOCS / "index.md").read_text()):
        assert name in files or any(f"def {name}(" in text for text in files.values()), name
    questions = (DOCS / "index.md").read_text().split("## Frequent requests")[1]
    rows = [row for row in questions.splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 5
    assert all(re.search(r"`test_\w+\.py`: test_\w+", row) for row in rows)


def snippets() -> list[tuple[str, int, str]]:
    return [
        (str(page.relative_to(ROOT)), line, text)
        for page in PAGES
        for line, language, text in blocks(page.read_text())
        if language == "python"
    ]


@pytest.mark.parametrize(("page", "line", "text"), snippets(), ids=lambda value: str(value)[:40].split("\n")[0])
def test_snippets_are_python_and_name_what_there_is(page, line, text):
    tree = ast.parse(text, f"{page}:{line}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}:{line}: {node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "blip":
            assert hasattr(blip, node.attr), f"{page}:{line}: blip has no {node.attr}"


_TASKS = ("python", "captioning", "vqa", "retrieval", "features", "explain")


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", *(f"docs/{task}.md" for task in _TASKS)])
def test_snippets_run_on_a_tiny_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = blip.Tokenizer.load("world")
    model = Blip(BlipConfig(TINY.vision, tokenizer.text_config(TINY.text), TINY.embed_dim)).eval()
    for folder in ("demo", "demo/captioner", "pretrain_world", "caption_world", "filter_world"):
        blip.save_pretrained(model, tokenizer, Path("runs", folder, "model"))
    blip.save_pretrained(Vqa.from_blip(model), tokenizer, Path("runs/vqa_world/model"))
    world_files.write("runs/world", "json", "test", 3)
    Image.new("RGB", (50, 40), (200, 30, 30)).save("photo.jpg")
    known = {"blip": blip, "torch": torch, "images": torch.zeros(1, 3, 64, 64)}
    texts = [text for page, _, text in snippets() if page == name]
    assert texts
    for text in texts:
        here = text.replace('device="cuda"', 'device="cpu"')
        run_snippet(compile(here, name, "exec"), known)


def run_snippet(code, names: dict) -> None:
    exec(code, names)  # our own pages


# The pages, walked ---------------------------------------------------------------------------------------------------

FEW = ["--train.steps", "3", "--train.batch_size", "4", "--train.warmup_steps", "1", "--train.precision", "float32"]
FEW += ["--train.log_every", "1", "--data.workers", "0", "--train.timeout", "60"]
WORLD = ["--world.train", "24", "--world.held_out", "6"]
SHORTER = {
    "recipes": lambda name, args: [*args, *FEW, *(WORLD if _draws(name, args) else [])],
    "blip.world": lambda name, args: [*args, *_writer(args)],
    "eval": lambda name, args: [*args, *([] if args[0] == "classification" else ["--limit", "4"])],
    "capfilt": lambda name, args: [*args, *_capfilt(args)],
}
"""What is added to a command so that it is done in seconds."""


def _draws(name: str, args: list[str]) -> bool:
    if "--world" in args:
        return False
    configs = [value for option, value in itertools.pairwise(args) if option == "--config"]
    return any("world" in recipes_command.content(str(ROOT / config)) for config in configs)


def _writer(args: list[str]) -> list[str]:
    few = {"--count": "24", "--sets": "4", "--broken": "3", "--workers": "1"}
    return [word for option, count in few.items() if option in args for word in (option, count)]


def _capfilt(args: list[str]) -> list[str]:
    return {
        "plan": ["--part-size", "16"],
        "score": ["--batch", "8"],
        "run": ["--part-size", "16", "--batch", "8"],
        "select": ["--itm", "0.0"],  # an untrained filter would keep nothing
        "calibrate": ["--count", "20"] if "--count" in args else [],
    }.get(args[0], [])


def perform(folder: str, name: str, args: list[str]) -> None:
    """`python -m name args` in a folder."""
    import runpy

    os.chdir(folder)
    sys.argv = [name, *args]
    sys.modules.pop(name, None)
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):  # what Python itself would do with it
            print(end.code, file=sys.stderr)
            raise SystemExit(1) from None
        raise


class Walker(Zygote):
    """Carries out commands, each in a process of its own that has imported everything already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        environment |= {"PYTHONPATH": SEARCHED, "HF_HUB_OFFLINE": "1"}
        run = [sys.executable, "-c", "import stub_run, test_docs; test_docs.import_all(); stub_run.serve()"]
        self.process = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def walk(self, command: Command) -> None:
        for words in simple(command.text):
            if given := module_of(words):
                status, output = self.python(*given)
                assert status == 0, f"{command}\nended with {status}:\n{output[-3000:]}"

    def python(self, name: str, args: list[str]) -> tuple[int, str]:
        """Status of `python -m name args` and what it said."""
        log = self.folder / "log"
        (pid,) = self.spawn(log, "perform", module="test_docs", folder=str(self.folder), name=name, args=args)
        status = self.wait(pid, 900)
        return status or 0, Path(f"{log}-0").read_text()


def import_all() -> None:
    from blip.app import cli  # noqa: F401
    from blip.checkpoints import checkpoint  # noqa: F401
    from capfilt.report import write  # noqa: F401
    from capfilt.score import models  # noqa: F401
    from recipes import caption, dialogue, nlvr, pretrain, retrieval, vqa  # noqa: F401


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs and its options, made short; None for what is not walked: make, git, servers."""
    if words[0] == "blip":
        return None if words[1] in ("demo", "doctor") else ("blip.app.cli", words[1:])
    if words[0] == "blip-eval":
        words = ["python", "-m", "eval", *words[1:]]
    if words[0] == "blip-recipe":
        words = ["python", "-m", f"recipes.{words[1]}", *words[2:]]
    if words[0] not in ("python", "accelerate", "torchrun"):
        return None
    module, *args = words[words.index("-m") + 1 :]
    if "--help" in args or module.startswith("benchmarks"):
        return module, args
    kind = next(kind for kind in SHORTER if module.startswith(kind))
    return module, SHORTER[kind](module, args)


@cache
def my_files(folder: Path) -> None:
    """What the page about fine-tuning says a reader has, with images; some photographs."""
    text = (DOCS / "finetuning.md").read_text()
    matches = re.findall(r"`(mine/[\w-]+\.json)`, and [^`]*`(mine/[\w-]+\.json)`.*?```json\n(.*?)```", text, re.S)
    assert len(matches) == 4, "captions, questions, pairs, dialogue"
    for train, held_out, content in matches:
        rows = json.loads(content)
        for name in (train, held_out):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(rows))
        for image in set(re.findall(r'"(images/\w+\.jpg)"', content)):
            draw(folder / "mine" / image)
    answers = [{"question_id": row["question_id"], "answer": "two"} for row in json.loads(matches[1][2])]
    (folder / "mine/answers.json").write_text(json.dumps(answers))
    for name in ("photo.jpg", "photos/1.jpg", "photos/2.jpg"):
        draw(folder / name)


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(sum(map(ord, str(path.name))) * k % 256 for k in (3, 5, 7))
    Image.new("RGB", (80, 60), colour).save(path)


WALKED = ["docs/quickstart.md", "docs/own_crawl.md", "docs/finetuning.md", "docs/captioning.md", "docs/retrieval.md"]
WALKED += ["docs/vqa.md", "docs/nlvr2.md", "docs/dialogue.md", "docs/features.md", "docs/explain.md", "docs/world.md"]
"""Pages in the order of a reader."""


@pytest.mark.slow
def test_the_pages_commands_run(tmp_path):
    """Every command of the pages for newcomers, except what is marked: own crawl, own data, one process."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    my_files(tmp_path)
    walker = Walker(tmp_path)
    unmarked = [command for name in WALKED for command in of(name) if command.needs is None and read(command)]
    to_walk: dict[str, Command] = {}
    for command in unmarked:
        to_walk.setdefault(" ".join(command.text.split("#")[0].split()), command)
    for command in to_walk.values():
        walker.walk(command)
    assert len(to_walk) > 60
    for made in ("runs/own/second/model", "runs/own/job/report/half/report.html", "runs/mine/dialogue/results.json"):
        assert (tmp_path / made).exists(), made
    assert json.loads((tmp_path / "runs/mine/caption/results.json").read_text())["validation"]


@pytest.mark.slow
def test_pretraining_converges(tmp_path):
    """The quick start's first command with a quarter of its steps: losses fall, recalls are far above chance."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    args = ["--config", "recipes/configs/pretrain_world.yaml", "--train.steps", "200", "--world.train", "6000"]
    status, output = Walker(tmp_path).python("recipes.pretrain", args)
    assert status == 0, output[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "runs/pretrain_world/metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line["losses"] for line in lines if "losses" in line]
    scores = next(line["eval"] for line in lines if "eval" in line)
    assert last["lm"] < 0.6 * first["lm"]
    assert last["itc"] < 0.75 * first["itc"]
    chance = 100 / 200
    assert min(scores["tr@1_itc"], scores["ir@1_itc"]) > 10 * chance


# Reference and figures -----------------------------------------------------------------------------------------------


def test_the_reference_has_every_module_that_it_promises():
    listed = set(re.findall(r"^\.\. automodule:: (\S+)", "".join(p.read_text() for p in DOCS.glob("api/*.rst")), re.M))
    for name in listed:
        assert importlib.util.find_spec(name), name
    public = {module for name, module in blip._WHERE.items()}
    assert public <= listed, public - listed
    for folder in ("tasks",):
        modules = {f"blip.{folder}.{path.stem}" for path in (ROOT / "blip" / folder).glob("[a-z]*.py")}
        assert modules <= listed, modules - listed
    assert {name.split(".")[0] for name in listed} == {"blip", "capfilt", "eval"}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the site needs Sphinx, of the extra docs")
    run = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    page = (tmp_path / "api/model.html").read_text()
    assert 'id="blip.models.blip.Blip.context"' in page
    for path in DOCS.glob("*.md"):
        title = re.search(r"^# (.+)$", path.read_text(), re.M)[1]
        assert f">{title}<a" in (tmp_path / f"{path.stem}.html").read_text(), (
            f"{path.name} is hidden by a page of Sphinx"
        )


def test_the_captions_on_the_front_page_are_true():
    """In every word: docs/images.py keeps them in the file, with the names of their scenes."""
    shown = json.loads(Image.open(DOCS / "capfilt.png").text["shown"])
    assert len(shown) == 8
    for card in shown:
        assert len(card["captions"]) == 1
        assert judge(scene_of(card["image_id"]), card["captions"][0]).true, card


def test_the_computed_costs_are_those_of_the_page():
    page = (DOCS / "scaling.md").read_text()
    for table in cost.tables():
        assert table in page, f"docs/scaling.md is not what `python -m benchmarks.cost` prints:\n{table}"


@pytest.mark.parametrize("size", ["BASE, 224 px", "BASE, 384 px", "LARGE, 384 px"])
def test_operations_are_those_that_pytorch_counts(size):
    """An image's way and its projection, counted by PyTorch on the meta device."""
    config = BASE if "BASE" in size else LARGE
    side = int(size.split()[1])
    config = BlipConfig(type(config.vision)(config.vision.model, image_size=side), config.text)
    with torch.device("meta"):
        model = Blip(config).eval()
        image = torch.zeros(1, 3, side, side)
    shape = cost.SHAPES[size]
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        tokens = model.vision(image)
    assert counted.get_total_flops() == pytest.approx(cost.vision(shape), rel=2e-3)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.med.context(tokens)
    assert counted.get_total_flops() == pytest.approx(cost.context(shape), rel=1e-6)
