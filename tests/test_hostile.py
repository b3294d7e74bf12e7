"""Files, names and settings that nobody vouches for: read as data or refused; never executed, fetched or led astray."""

import ast
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import blip
from blip import files, startup
from blip.checkpoints.initial import initial_text, initial_vision
from blip.checkpoints.weights import read_weights
from blip.data.formats.finding import find
from blip.data.formats.sources import open_source
from blip.data.formats.tars import Shard
from blip.data.images import decode
from blip.data.settings import SourceConfig
from blip.data.stream import CaptionShards
from blip.errors import BadSample, DataError
from blip.models.blip import Blip
from blip.models.presets import TINY
from blip.objectives.pretrain import Pretrain
from blip.tensors import read_tensors
from blip.tokenizer import Tokenizer
from blip.train import drift
from blip.train.state import Checkpoints, State, restore
from capfilt.reading import index_tar
from eval.metrics.java import NoJava, run_java

ROOT = Path(__file__).resolve().parents[1]


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# The current folder


SHADOWS = ("numpy", "pyarrow", "PIL", "typing", "dataclasses", "argparse", "torch", "yaml", "jsonargparse", "ray", "av")
LIBRARIES = sysconfig.get_paths()["purelib"]


@pytest.fixture
def crawl(tmp_path):
    """A downloaded folder: two images with texts, and modules that leave a note when somebody imports them."""
    here = tmp_path / "crawl"
    here.mkdir()
    with tarfile.open(here / "a.tar", "w") as tar:
        for i in range(2):
            for name, content in ((f"{i}.png", png(90 * i)), (f"{i}.txt", b"a red star")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for name in (*SHADOWS, "blip", "eval"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'sang')!r}, 'a').write('{name} ')\n")
    return here


def stand_in(folder: Path, *command: str, **environment: str) -> str:
    """What a command prints that is given in a folder; it has to end well."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PLAN = ["plan", "--input", "a.tar", "--out", "../run", "--scorer", "fake"]
SCORE = ["score", "../run", "--decode-workers", "1"]


@pytest.mark.parametrize("how", ["python -m", "a script with an empty entry of PYTHONPATH"])
def test_a_crawls_own_modules_are_not_run(crawl, how):
    """Neither by the command nor by the decoders that it starts."""
    script = crawl.parent / "capfilt"
    script.write_text("import sys\nfrom capfilt.__main__ import main\nsys.exit(main())\n")
    module, given = ["-m", "capfilt"], {}
    if how != "python -m":
        module, given = [str(script)], {"PYTHONPATH": os.pathsep.join(["", "/nowhere"])}
    for args in (PLAN, SCORE):
        stand_in(crawl, sys.executable, *module, *args, **given)
    assert "rows 2 = ok 2" in stand_in(crawl, sys.executable, *module, "verify", "../run", **given)
    assert not (crawl.parent / "sang").exists()


@pytest.mark.parametrize(
    "module",
    [["-m", "blip.app.cli"], ["-m", "eval"], ["-mrecipes"], ["-u", "-m", "recipes.caption"], ["-um", "recipes"]],
)
def test_entry_points_import_nothing_from_the_current_folder(crawl, module):
    """Not even an eval.py, where the recipe that is asked for imports the package eval."""
    if "eval" in module:
        (crawl / "eval.py").unlink()  # this one Python itself would take for the program
    if "blip.app.cli" in module:
        (crawl / "blip.py").unlink()
    assert stand_in(crawl, sys.executable, *module, "--help")
    assert not (crawl.parent / "sang").exists()


def test_a_checkout_that_is_not_installed_finds_its_own_packages(crawl):
    """From the current folder, which is the checkout, come our packages and no others; its decoders are its own too."""
    for name in ("blip", "capfilt", "eval", "recipes"):
        (crawl / name).symlink_to(ROOT / name)
    for args in (PLAN, SCORE):
        stand_in(crawl, sys.executable, "-S", "-m", "capfilt", *args, PYTHONPATH=LIBRARIES)
    output = stand_in(crawl, sys.executable, "-S", "-m", "capfilt", "verify", "../run", PYTHONPATH=LIBRARIES)
    assert "rows 2 = ok 2" in output
    assert not (crawl.parent / "sang").exists()


def test_who_imports_our_packages_keeps_the_current_folder(crawl):
    """Only our own programs leave it; a reader's package is theirs, whatever it imports."""
    (crawl / "mine").mkdir()
    (crawl / "mine" / "__init__.py").write_text("import capfilt, recipes\n")
    (crawl / "mine" / "__main__.py").write_text("import helper\n")
    (crawl / "helper.py").write_text("print('of the folder')\n")
    for name in ("blip", "typing"):
        (crawl / f"{name}.py").unlink()
    assert stand_in(crawl, sys.executable, "-m", "mine") == "of the folder\n"


def test_programs_are_those_of_absolute_folders(tmp_path, monkeypatch):
    """Not a `git` or `java` of the current folder, to which an empty entry of PATH leads."""
    for folder in (tmp_path, tmp_path / "bin"):
        folder.mkdir(exist_ok=True)
        (folder / "java").write_text("#!/bin/sh\n")
        (folder / "java").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", str(tmp_path / "bin")]))
    assert startup.program("java") == str(tmp_path / "bin" / "java")
    monkeypatch.setenv("PATH", os.pathsep.join(["", "."]))
    assert startup.program("java") is None
    with pytest.raises(NoJava, match="no java on PATH"):
        run_java(["-version"], 1.0, {})
    assert drift.git_commit() is None


STARTS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}


def test_every_child_is_started_by_its_absolute_path():
    """Each place that starts a process, and what it starts."""
    programs = {}
    for folder in ("blip", "capfilt", "eval", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in STARTS:
                    programs[str(path.relative_to(ROOT))] = ast.unparse(node.args[0])
    assert programs == {
        "blip/app/doctor.py": "[where, '-version']",
        "blip/train/drift.py": "command",
        "capfilt/score/launch.py": "startup.python('capfilt', 'score', *arguments)",
        "capfilt/score/pool.py": "startup.python('capfilt.score.pool', str(theirs.fileno()), str(errors.fileno()))",
        "eval/metrics/java.py": "command",
    }
    assert startup.python("capfilt.score.pool", "7")[1:] == [
        "-P",
        str(ROOT / "blip" / "startup.py"),
        "capfilt.score.pool",
        "7",
    ]


# Nothing that is loaded is executed


class Canary:
    """Sings when it is unpickled: makes the folder CANARY."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Where it is seen that the canary sang."""
    monkeypatch.setenv("CANARY", str(tmp_path / "it sang"))
    return tmp_path / "it sang"


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer.load("world")
    torch.manual_seed(0)
    return Blip(blip.BlipConfig(TINY.vision, tokenizer.text_config(TINY.text), TINY.embed_dim)), tokenizer


def pth(folder: Path, model, name: str = "a.pth", **options) -> None:
    torch.save({"model": {"weight": torch.zeros(1), "x": Canary()}}, folder / name, **options)
    read_weights(folder / name)


def bare_pickle(folder: Path, model, name: str = "a.bin") -> None:
    (folder / name).write_bytes(pickle.dumps(Canary(), protocol=2))
    read_weights(folder / name)


def a_models_weights(folder: Path, model) -> None:
    blip.save_pretrained(*model, folder / "model")
    torch.save(Canary(), folder / "model/model.safetensors")
    blip.from_pretrained(folder / "model")


def first_weights_of_vision(folder: Path, model) -> None:
    torch.save({"state_dict": Canary()}, folder / "vit.pth")
    initial_vision(model[0], folder / "vit.pth")


def first_weights_of_text(folder: Path, model) -> None:
    torch.save({"bert.x": Canary()}, folder / "pytorch_model.bin")
    initial_text(model[0], folder, model[1])


def checkpoint(folder: Path, model, name: str) -> None:
    """A whole training checkpoint, its manifest included, in which one file is not what it was."""
    objective = Pretrain(model[0], blip.objectives.pretrain.PretrainConfig(queue_size=0))
    path = Checkpoints(folder, 1).save(objective, {"optimizer": {"state": {}}}, State(), {})
    torch.save({"optimizer": Canary()}, path / name)
    manifest = json.loads((path / files.MANIFEST).read_text())
    content = (path / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    newest, _ = Checkpoints(folder, 1).newest()
    assert newest == path, "the forged manifest must pass"
    restore(path, objective)


def tokenizer_file(folder: Path, model, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Canary(), protocol=0))
    Tokenizer.load(folder)


def numpy_objects(folder: Path, model) -> None:
    np.save(folder / "a.npy", np.array([Canary()], dtype=object), allow_pickle=True)
    (folder / "a.json").write_text(json.dumps([{"image": "a.npy", "caption": "x"}]))
    decode(open_source(SourceConfig(str(folder / "a.json")))[0].image, 1000)


def script_of_a_data_set(folder: Path, model) -> None:
    (folder / "set").mkdir()
    (folder / "set/set.py").write_text("import os\nos.mkdir(os.environ['CANARY'])\n")
    open_source(SourceConfig(str(folder / "set"), format="dataset"))


LOADS = {
    "weights, .pth": pth,
    "weights, .bin": lambda folder, model: pth(folder, model, "pytorch_model.bin"),
    "weights, .pt": lambda folder, model: pth(folder, model, "a.pt"),
    "weights, the older format": lambda f, m: pth(f, m, _use_new_zipfile_serialization=False),
    "weights, .pth that is a bare pickle": lambda folder, model: bare_pickle(folder, model, "a.pth"),
    "weights, .bin that is a bare pickle": bare_pickle,
    "weights, .safetensors that is a pickle": lambda f, m: bare_pickle(f, m, "a.safetensors"),
    "a model's weights": a_models_weights,
    "first weights of the image encoder": first_weights_of_vision,
    "first weights of the text transformer": first_weights_of_text,
    "a checkpoint's optimizer state": lambda folder, model: checkpoint(folder, model, "optimizer.pt"),
    "a checkpoint's objective": lambda folder, model: checkpoint(folder, model, "objective.safetensors"),
    "tokenizer.json": lambda folder, model: tokenizer_file(folder, model, "tokenizer.json"),
    "vocab.txt": lambda folder, model: tokenizer_file(folder, model, "vocab.txt"),
    "an array of objects as an image": numpy_objects,
    "a data set's script": script_of_a_data_set,
}


@pytest.mark.parametrize("case", LOADS)
def test_a_pickle_is_refused_in_a_line_and_not_run(case, tmp_path, canary, model):
    with pytest.raises((ValueError, DataError, BadSample)) as error:
        LOADS[case](tmp_path, model)
    assert not canary.exists()
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value), "no advice to lower the guard"


def extension(folder: Path, kind: str) -> SourceConfig:
    """A table with a column of a type that old readers unpickle from the file's own schema."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Canary()),
    }
    schema = pa.schema([pa.field("image", pa.binary(), metadata=metadata), pa.field("caption", pa.string())])
    table = pa.table([[png()], ["hello"]], schema=schema)
    if kind == "parquet":
        pq.write_table(table, folder / "a.parquet")
        return SourceConfig(str(folder / "a.parquet"))
    datasets.Dataset.from_dict({"image": [png()], "caption": ["hello"]}).save_to_disk(folder / "set")
    (path,) = (folder / "set").glob("*.arrow")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_table(table)
    return SourceConfig(str(folder / "set"))


def pickles_in_a_tar(folder: Path) -> SourceConfig:
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "a.png", png())
        add(tar, "a.txt", b"hello")
        for suffix in ("pyd", "pth", "pt", "pkl", "pickle", "npy", "npz", "bin"):
            add(tar, f"a.{suffix}", pickle.dumps(Canary()))
    return SourceConfig(str(folder / "s.tar"))


PASSED_OVER = {
    "tar": pickles_in_a_tar,
    "parquet": lambda folder: extension(folder, "parquet"),
    "saved data set": lambda folder: extension(folder, "arrow"),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_a_pickle_beside_the_data_is_not_run(case, tmp_path, canary):
    config = PASSED_OVER[case](tmp_path)
    assert open_source(config)[0].captions == ["hello"]
    if case != "saved data set":
        shards = CaptionShards(config)
        assert [record.captions for record in shards.read(shards.files[0])] == [["hello"]]
    assert not canary.exists()


def test_the_canary_does_sing(canary):
    pickle.loads(pickle.dumps(Canary()))  # what must never be done
    assert canary.exists()


def test_no_code_can_unpickle():
    """Calls beyond those that tests/test_house.py bans."""
    banned = {"pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open", "joblib.load", "dill.load"}
    banned |= {"dill.loads", "torch.hub.load", "torch.package.PackageImporter", "pd.read_pickle"}
    for folder in ("blip", "capfilt", "eval", "recipes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in banned, f"{path}:{node.lineno}"
                    for word in node.keywords:
                        allowed = word.arg != "allow_pickle" or ast.unparse(word.value) == "False"
                        assert allowed, f"{path}:{node.lineno} allow_pickle"


def test_a_second_name_for_a_tensor_that_is_not_there(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"same_as:b": "c"})
    with pytest.raises(ValueError, match=r"a\.safetensors names c a second time"):
        read_tensors(tmp_path / "a.safetensors")


# Names that a user gives


@pytest.fixture
def folder(tmp_path):
    """set/images/0.png to 2.png, and beside the set an image and a folder that are nobody's business."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        (folder / f"images/{i}.png").write_bytes(png(i * 10))
    (tmp_path / "private").mkdir()
    for name in ("outside.png", "private/outside.png"):
        (tmp_path / name).write_bytes(png(255))
    (folder / "images/link.png").symlink_to(tmp_path / "outside.png")
    (folder / "images/linked").symlink_to(tmp_path / "private")
    return folder


SPECS = ["pipe:touch CANARY", "pipe:touch CANARY |", "|touch CANARY", "ssh://host/a.tar", "ssh:host/a.tar"]
SPECS += ["http://127.0.0.1:9/a.tar", "https://x/{000..009}.tar", "HTTP://x/a.tar", "s3://b/a.tar", "gs://b/a.tar"]
SPECS += ["hf://b/a.tar", "file://host/etc/a.tar", "data:text/plain,x.tar", "git+ssh://x/a.tar", "${HOME}/a.tar"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("where", ["source", "stream", "image_root"])
def test_commands_addresses_and_variables_are_no_sources(spec, where, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "a.json").write_text(json.dumps([{"image": "images/0.png", "caption": "x"}]))
    before = sorted(folder.rglob("*"))
    config = SourceConfig("a.json", image_root=spec) if where == "image_root" else SourceConfig(spec)
    with pytest.raises(DataError, match=r"only local files|not a file of this machine"):
        (CaptionShards if where == "stream" else open_source)(config)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("spec", ["$HOME/a.tar", "`touch CANARY`.tar", "$(touch CANARY).tar", "a.tar; touch CANARY"])
def test_no_shell_reads_a_source(spec, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="no such file"):
        open_source(SourceConfig(spec, format="tar"))
    assert not (folder / "CANARY").exists()


def test_what_the_user_names_may_be_anywhere_on_this_machine(folder, monkeypatch):
    """Other than what data names: up, absolute or through a link is the user's own choice."""
    shard = folder / "s-0.tar"
    with tarfile.open(shard, "w") as tar:
        add(tar, "a.png", png(70)), add(tar, "a.txt", b"hello")
    (folder / "images/s-1.tar").symlink_to(shard)
    monkeypatch.chdir(folder / "images")
    for spec in ("../s-0.tar", str(shard), "s-1.tar", "../s-{0..0}.tar", "../*.tar"):
        assert [one.path.resolve() for one in find(spec)] == [shard]
        assert open_source(SourceConfig(spec))[0].captions == ["hello"]


# Names that data gives


NAMES = ["/etc/passwd", "../outside.png", "../private/../outside.png", "images/../../outside.png", "images/link.png"]
NAMES += ["images/linked/outside.png", "http://127.0.0.1:9/x.png", "https://x/y.png", "file:///etc/passwd"]
NAMES += ["pipe:cat /etc/passwd", "ssh://host/x.png", "hf://x/y.png", "s3://x/y.png", "\\\\host\\share.png"]


def rows_json(folder: Path, name: str) -> SourceConfig:
    (folder / "a.json").write_text(json.dumps([{"image": name, "caption": "x"}]))
    return SourceConfig(str(folder / "a.json"))


def rows_jsonl(folder: Path, name: str) -> SourceConfig:
    (folder / "a.jsonl").write_text(json.dumps({"image": name, "caption": "x"}) + "\n")
    return SourceConfig(str(folder / "a.jsonl"))


def rows_csv(folder: Path, name: str) -> SourceConfig:
    (folder / "a.csv").write_text(f'image,caption\n"{name}",x\n')
    return SourceConfig(str(folder / "a.csv"))


def rows_imagefolder(folder: Path, name: str) -> SourceConfig:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}) + "\n")
    return SourceConfig(str(folder))


def rows_karpathy(folder: Path, name: str) -> SourceConfig:
    parent, _, last = name.rpartition("/")
    image = {"filename": last, "filepath": parent, "sentences": [{"raw": "x"}], "split": "train"}
    (folder / "k.json").write_text(json.dumps({"images": [image]}))
    return SourceConfig(str(folder / "k.json"))


def rows_coco(folder: Path, name: str) -> SourceConfig:
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
    (folder / "c.json").write_text(json.dumps(coco))
    return SourceConfig(str(folder / "c.json"))


def rows_parquet(folder: Path, name: str) -> SourceConfig:
    pq.write_table(pa.table({"image": [name], "caption": ["x"]}), folder / "a.parquet")
    return SourceConfig(str(folder / "a.parquet"))


def rows_parquet_struct(folder: Path, name: str) -> SourceConfig:
    pq.write_table(pa.table({"image": [{"bytes": None, "path": name}], "caption": ["x"]}), folder / "b.parquet")
    return SourceConfig(str(folder / "b.parquet"))


def rows_dataset(folder: Path, name: str) -> SourceConfig:
    """As somebody may have edited it; `datasets` itself would look at the image while it saves."""
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": struct, "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": None, "path": name}], "caption": ["x"]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder / "saved")
    info = json.loads((folder / "saved/dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    (folder / "saved/dataset_info.json").write_text(json.dumps(info))
    config = SourceConfig(str(folder / "saved"), image_root=str(folder))
    assert "Image" in str(datasets.load_from_disk(config.path).features), "the edit must take"
    return config


ROWS = [rows_json, rows_jsonl, rows_csv, rows_imagefolder, rows_karpathy, rows_coco, rows_parquet, rows_parquet_struct]
ROWS += [rows_dataset]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_row_cannot_name_what_is_outside_or_elsewhere(rows, name, folder):
    with pytest.raises((DataError, BadSample), match=r"outside|address"):
        open_source(rows(folder, name))[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [rows_json, rows_jsonl, rows_parquet, rows_parquet_struct])
def test_a_streamed_row_cannot_either(rows, name, folder):
    shards = CaptionShards(rows(folder, name))
    (row,) = shards.read(shards.files[0])
    assert "outside" in row.reason or "address" in row.reason


@pytest.mark.parametrize("rows", ROWS)
def test_these_rows_do_name_what_is_inside(rows, folder):
    record = open_source(rows(folder, "images/1.png"))[0]
    assert decode(record.image, 1000).getpixel((0, 0))[0] == 10


# Tar members


def add(tar: tarfile.TarFile, name: str, data: bytes, **attributes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    tar.addfile(member, io.BytesIO(data))


MEMBERS = {
    "parent": ("../../evil.png", {}),
    "parent inside": ("a/../../evil.png", {}),
    "absolute": ("/etc/evil.png", {}),
    "parent in an extended header": ("../" * 40 + "evil.png", {}),
    "symbolic link": ("a.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "symbolic link inside": ("a.png", {"type": tarfile.SYMTYPE, "linkname": "b.png"}),
    "hard link": ("a.png", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
    "character device": ("a.png", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
    "block device": ("a.png", {"type": tarfile.BLKTYPE}),
    "pipe": ("a.png", {"type": tarfile.FIFOTYPE}),
}


@pytest.mark.parametrize("read", [open_source, CaptionShards])
@pytest.mark.parametrize("case", MEMBERS)
def test_hostile_members_are_refused(case, read, folder):
    name, attributes = MEMBERS[case]
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "z.png", png()), add(tar, "z.txt", b"hello")
        add(tar, name, b"" if attributes else png(), **attributes)
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(DataError, match=r"s\.tar: member .*(points outside|link or device)"):
        read(SourceConfig(str(folder / "s.tar")))
    assert sorted(folder.parent.rglob("*")) == before


SIZES = {
    "leads back": (tarfile.REGTYPE, -512),
    "leads before the file": (tarfile.REGTYPE, -(1 << 40)),
    "beyond the file": (tarfile.REGTYPE, 1 << 40),
    "beyond all files": (tarfile.REGTYPE, 1 << 80),
    "a name that fills all memory": (tarfile.GNUTYPE_LONGNAME, 1 << 80),
    "a header that fills all memory": (tarfile.XHDTYPE, 1 << 80),
    "a header of negative size": (tarfile.XHDTYPE, -1024),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_cannot_be_are_refused(case, folder):
    """The first leads back to its own header: a reader that follows it never comes to an end."""
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "a.png", png()), add(tar, "a.txt", b"hello"), add(tar, "b.txt", b"hello")
    content = bytearray((folder / "s.tar").read_bytes())
    at = content.index(b"b.txt")
    kind, size = SIZES[case]
    content[at + 124 : at + 136] = bytes([0x80 if size > 0 else 0xFF]) + size.to_bytes(12, "big", signed=True)[1:]
    content[at + 156 : at + 157] = kind
    header = content[at : at + 148] + b" " * 8 + content[at + 156 : at + 512]
    content[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    (folder / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar is not a whole tar file"):
        Shard(folder / "s.tar")
    rows, damage, _ = index_tar(str(folder / "s.tar"))
    assert (rows["key"].to_pylist(), bool(damage)) == (["a"], True)


# Without a network


DRIVER = """
import contextlib, io, json, os, runpy, socket, sys
def refuse(*_, **__):
    with open("connections", "a") as file: file.write("tried\\n")
    raise OSError("no network here")
real = socket.socket.connect
def connect(self, address):
    return real(self, address) if self.family == socket.AF_UNIX else refuse()
socket.socket.connect = socket.socket.connect_ex = connect
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
import blip.app.cli, blip.world.files, recipes.demo, blip.app.loaded  # once, for all the children below
found = []
for args in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        for name in [name for name in sys.modules if name == args[0]]: del sys.modules[name]
        status, sys.argv = 0, args
        try:
            runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append([status, open("said", errors="replace").read()])
print(json.dumps(found))
"""


SMALL = ["--world.train", "24", "--world.held_out", "6", "--world.image_size", "32", "--model.image_size", "32"]
SMALL += ["--held_out.k", "2", "--train.steps", "2", "--train.batch_size", "8", "--train.warmup_steps", "1"]
WORLD = ["blip.world.files", "--out", "written", "--split", "test", "--count", "8", "--size", "32"]
WORKS = [
    [*WORLD, "--format", "json"],
    [*WORLD, "--format", "tar"],
    [*WORLD, "--format", "parquet"],
    ["blip.world.files", "--help"],
    ["recipes.pretrain", "--config", "recipes/configs/pretrain_world.yaml", *SMALL],
    ["recipes.pretrain", "--help"],
    ["recipes.pretrain", "--config", "recipes/configs/pretrain_base.yaml", "--print_config"],
    ["recipes.demo", *SMALL],
    ["recipes.retrieval", "--help"],
    ["recipes.retrieval", "--config", "recipes/configs/retrieval_coco.yaml", "--print_config"],
    ["blip.world.questions", "--out", "written", "--split", "test", "--count", "8"],
    ["recipes.vqa", "--config", "recipes/configs/vqa_v2.yaml", "--print_config"],
    ["blip.world.pairs", "--out", "written_pairs", "--split", "test", "--sets", "2", "--size", "32"],
    ["blip.world.dialogues", "--out", "written_dialogue", "--split", "test", "--count", "2", "--size", "32"],
    ["recipes.nlvr", "--config", "recipes/configs/nlvr2.yaml", "--print_config"],
    ["recipes.dialogue", "--config", "recipes/configs/visdial.yaml", "--print_config"],
    ["recipes.bootstrap", "--config", "recipes/configs/bootstrap_world.yaml", "--print_config"],
    ["blip.app.cli", "--help"],
    ["blip.app.cli", "doctor"],
    ["blip.app.cli", "match", "written/images/test", "a red star", "--model", "runs/demo/model"],
    ["blip.app.cli", "search", "written/images/test", "a red star", "--model", "runs/demo/model", "--index", "index"],
    ["blip.app.cli", "caption", "written/images/test", "--model", "runs/demo/model", "--prompt", ""],
]
PRETRAIN = ["recipes.pretrain", "--out", "out", "--model.size", "tiny"]
PRETRAIN += ["--data.sources", '[{"path": "written/test.json"}]']
OWN = [*PRETRAIN, "--model.tokenizer", "world"]
BERT, VIT = "google-bert/bert-base-uncased", "vit_tiny_patch16_224.augreg_in21k"
LACKS = {
    "bert-base-uncased": PRETRAIN,
    "someone/words": [*PRETRAIN, "--model.tokenizer", "someone/words"],
    f"timm/{VIT}": [*OWN, "--model.vision_weights", VIT],
    f"{BERT}/model.safetensors": [*OWN, "--model.text_weights", BERT],
    "someone/model": [*OWN, "--model.start_from", "someone/model"],
    "someone/pairs": [*OWN, "--data.sources", '[{"path": "someone/pairs", "format": "dataset"}]'],
    "someone/start": ["recipes.retrieval", "--out", "out", "--model.start_from", "someone/start"],
    "someone/talker": ["recipes.dialogue", "--out", "out", "--model.start_from", "someone/talker"],
    "someone/answers": ["recipes.vqa", "--out", "out", "--model.start_from", "someone/answers"],
    "someone/captioner": ["blip.app.cli", "caption", "written/images/test", "--model", "someone/captioner"],
}


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> tuple[Path, list[tuple[int, str]]]:
    """The folder in which the commands above ran without a socket, and with what status and words each ended."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "recipes").symlink_to(ROOT / "recipes")  # the configs are named from the repository's folder
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([*WORKS, *LACKS.values()])],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_documented_commands_need_no_network(offline):
    folder, outcomes = offline
    assert not (folder / "connections").exists(), "somebody tried to connect"
    for command, (status, output) in zip(WORKS, outcomes, strict=False):
        assert status == 0, f"{command}: {output}"
    assert (folder / "runs/demo/report.html").exists()
    assert outcomes[len(WORKS) - 1][1].count("written/images/test/") == 8


def test_what_is_missing_without_a_network_is_named(offline):
    for (name, command), (status, output) in zip(LACKS.items(), offline[1][len(WORKS) :], strict=True):
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert (status, len(errors)) == (2, 1), f"{command}: {output}"
        assert name in errors[0]
        assert "Traceback" not in output
