"""Diagnosis of this machine for the project: a list of findings, each with its remedy.

It is run when something is wrong, so no check waits long or raises, and importing it needs only Python itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blip import installed, processes, startup

OK, UNTESTED, MISSING, WRONG = "ok", "untested", "missing", "wrong"
_EXTRAS = {
    "demo": "the page of `blip demo`",
    "ray": "CapFilt on several machines",
    "video": "video clips",
    "heif": "HEIC images, as telephones take them",
    "serve": "the HTTP service, `blip serve`",
    "language": "the language of captions, a score of CapFilt",
    "tensorboard": "tracking of training runs",
    "wandb": "tracking of training runs",
    "trackio": "tracking of training runs",
}
TOKENIZERS = ("google-bert/bert-base-uncased", "bert-base-uncased")
"""Hub names of the released models' vocabulary; the synthetic world has its own."""
_TARFILE_MENDED = {(3, 11): (3, 11, 10), (3, 12): (3, 12, 6)}
"""First releases of two series without CVE-2024-6232; later series never had it, except candidates of 3.13.0."""
LITTLE_DISK = 5 << 30
"""Free bytes below which a hint is given. A base model's checkpoint with optimizer is about 4 GB; two are kept."""
_SECONDS = 10.0
"""Time limit of a program asked for its version."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    status: str
    """OK, UNTESTED (a version that the test suite has not run on), MISSING (something optional) or WRONG (the core does
    not work)."""
    said: str
    remedy: str = ""
    """What to do; empty if nothing needs to be done."""


def examine(folder: Path) -> Iterator[Finding]:
    """Run all checks, the quick ones first; `folder` is where runs are written."""
    checks: list[Callable[[], list[Finding]]] = [
        python, core, extras, hardware, cores, memory, lambda: [disk(folder)], lambda: [cache()], hub, java, video,
    ]  # fmt: skip
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a check that fails is reported like any finding
            name = getattr(check, "__name__", "disk").strip("<>")
            yield Finding(name, WRONG, f"check failed: {type(error).__name__}: {_line(error)}")


def works(findings: list[Finding]) -> bool:
    """Whether nothing is wrong; versions that are not tested and missing optional parts do not count."""
    return all(finding.status != WRONG for finding in findings)


# What is installed ----------------------------------------------------------------------------------------------------


def python() -> list[Finding]:
    wanted = importlib.metadata.metadata(installed.PROJECT).get("Requires-Python") or ">=3.11"
    floor = tuple(map(int, re.findall(r"\d+", wanted)))
    versions = (
        f"{platform.python_version()} at {sys.executable}; openblip {importlib.metadata.version(installed.PROJECT)}"
    )
    if sys.version_info[: len(floor)] < floor:
        return [Finding("python", WRONG, versions, f"Python {wanted} is needed")]
    return [Finding("python", OK, versions), *tar_reader()]


def tar_reader() -> list[Finding]:
    """Whether an archive can keep this Python's tarfile busy for hours; our own reader is not affected."""
    if sys.version_info >= _TARFILE_MENDED.get(sys.version_info[:2], (3, 13, 0, "candidate", 2)):
        return []
    detail = f"a malicious archive can block tarfile of Python {platform.python_version()} for hours (CVE-2024-6232); "
    detail += "training and CapFilt are not affected"
    return [
        Finding("tarfile", OK, detail, "use Python 3.11.10, 3.12.6 or newer for programs that open untrusted archives")
    ]


def core() -> list[Finding]:
    """Check the required packages, and whether the largest of them can be imported."""
    packages = installed.packages()
    faults = [
        Finding(
            one.name, WRONG, f"{one.version or 'not installed'}; {one.wanted or 'any version'} is needed", one.remedy
        )
        for one in packages
        if not one.fits
    ]
    here = {one.name: one.version for one in packages if one.fits}
    for name in ("torch", "torchvision", "transformers", "timm"):
        if name in here:
            try:
                importlib.import_module(name)
            except Exception as error:
                detail = f"{here[name]} is installed but cannot be imported: {_line(error)}"
                faults.append(Finding(name, WRONG, detail, f"reinstall it: pip install --force-reinstall {name}"))
    listed = Finding("packages", OK, ", ".join(f"{name} {version}" for name, version in here.items()))
    return [*faults, listed, *(tested(name, here[name]) for name in installed.TESTED if name in here)]


def tested(name: str, version: str) -> Finding:
    """Whether the test suite passes on this series of a package."""
    oldest, newest = installed.TESTED[name]
    if _series(oldest) <= _series(version) <= _series(newest):
        return Finding(name, OK, f"{version}, within the tested range ({oldest} to {newest})")
    detail = f"{version} is outside the tested range ({oldest} to {newest}); it may work as well"
    return Finding(name, UNTESTED, detail, f"if something fails: pip install '{name}~={newest}.0'")


def _series(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def extras() -> list[Finding]:
    """Check the optional packages."""
    findings = []
    for extra, what in _EXTRAS.items():
        for one in installed.packages(extra):
            if one.fits:
                findings.append(Finding(extra, OK, f"{one.name} {one.version}, for {what}"))
            else:
                detail = f"{one.name} {one.version + ' is too old' if one.version else 'is not installed'}, for {what}"
                findings.append(Finding(extra, MISSING, detail, one.remedy))
    return findings


def video() -> list[Finding]:
    """Check PyAV, which reads clips with its own FFmpeg. An ffmpeg program is not used."""
    if importlib.util.find_spec("av") is None:
        return []  # reported by `extras`
    import av

    parts = ", ".join(f"{name} {'.'.join(map(str, version))}" for name, version in av.library_versions.items()
                      if name in ("libavcodec", "libavformat"))  # fmt: skip
    return [Finding("ffmpeg", OK, f"inside PyAV: {parts}")]


def java(seconds: float = _SECONDS) -> list[Finding]:
    """Check Java, which METEOR, SPICE and Stanford's tokenizer need."""
    need = "METEOR, SPICE and Stanford's tokenizer"
    remedy = "install a JRE (Debian: apt-get install default-jre-headless); evaluations without it say what is missing"
    where = startup.program("java")
    if where is None:
        return [Finding("java", MISSING, f"no java on PATH, for {need}", remedy)]
    try:
        ran = subprocess.run(
            [where, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("java", MISSING, f"{where} does not run ({_line(error)})", remedy)]
    output = (ran.stderr or ran.stdout).strip().splitlines()
    if ran.returncode or not output:
        return [Finding("java", MISSING, f"{where} ends with status {ran.returncode}", remedy)]
    return [Finding("java", OK, f"{output[0]}, for {need}")]


# Hardware -------------------------------------------------------------------------------------------------------------


def hardware() -> list[Finding]:
    """The device and precision that commands and training use by default."""
    import torch

    from blip.nn import linear
    from blip.train.precision import multiplies_bfloat16

    if torch.cuda.is_available():
        findings = []
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            kind = "bfloat16" if multiplies_bfloat16(torch.device("cuda", i)) else "no bfloat16: use float16"
            findings.append(Finding("device", OK, f"cuda:{i} {card.name}, {_size(card.total_memory)}, {kind}"))
        return [*findings, _precision("cuda")]
    detail = f"cpu {_processor()}; kernels: {torch.backends.cpu.get_cpu_capability()}"
    fast = [name for name, flag in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")) if flag in _flags()]
    usual = "yes" if multiplies_bfloat16(torch.device("cpu")) else "no (it would be slow)"
    detail += f"; bfloat16 in hardware: {', '.join(fast) or usual}"
    detail += f"; float32 matrix products by {'oneDNN' if linear.ONEDNN else 'MKL or PyTorch'}"
    return [Finding("device", OK, detail), _precision("cpu")]


def _precision(device: str) -> Finding:
    import torch

    from blip.train.precision import precision
    from blip.train.settings import TrainConfig

    training = str(precision(TrainConfig(precision="auto"), torch.device(device))).removeprefix("torch.")
    return Finding("precision", OK, f"commands compute in float32, training in {training}, by default")


def cores() -> list[Finding]:
    """Count cores: present, available and used."""
    import torch

    there = os.cpu_count() or 1
    mine = processes.cores()
    detail = f"{torch.get_num_threads()} compute threads; {mine} of {there} cores available to this process"
    share = _share()
    if share:
        detail += f", limited to {share:g} by the container"
    if os.environ.get("OMP_NUM_THREADS"):
        detail += f"; OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}"
    if share and torch.get_num_threads() > share + 1:
        return [Finding("cores", OK, detail, f"set OMP_NUM_THREADS={max(1, int(share))}: more threads only wait")]
    return [Finding("cores", OK, detail)]


def memory() -> list[Finding]:
    """Main memory, and a container's limit of it."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{_size(there)} of main memory"
    limit = _read("/sys/fs/cgroup/memory.max")
    if limit.isdigit() and int(limit) < there:
        detail += f", limited to {_size(int(limit))} by the container"
    return [Finding("memory", OK, detail)]


def _share() -> float | None:
    """CPU limit of a container, in cores."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _processor() -> str:
    named = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    return named.group(1) if named else platform.processor() or platform.machine()


def _flags() -> list[str]:
    listed = re.search(r"^(?:flags|Features)\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return listed.group(1).split() if listed else []


# Disk and network -----------------------------------------------------------------------------------------------------


def disk(folder: Path) -> Finding:
    """Whether runs can be written, and the space left for them."""
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    detail = f"{_size(free)} free for {folder}"
    remedy = "use a folder that you can write to: blip doctor --out DIR, and --out DIR with the recipes"
    try:
        if not at.is_dir():
            raise NotADirectoryError(0, "it is a file")
        with tempfile.TemporaryFile(dir=at) as file:
            file.write(b"0")
    except OSError as error:
        return Finding("disk", WRONG, f"{at} cannot be written ({error.strerror})", remedy)
    if free < LITTLE_DISK:
        return Finding("disk", OK, detail, "checkpoints of a base model take about 3 GB each")
    return Finding("disk", OK, detail)


def cache() -> Finding:
    """The local cache of files from the hub."""
    from huggingface_hub import constants

    where = Path(constants.HF_HUB_CACHE)
    at = where
    while not at.exists():
        at = at.parent
    detail = f"files from the hub are cached in {where}, {_size(shutil.disk_usage(at).free)} free"
    if not os.access(at, os.W_OK):
        return Finding("cache", MISSING, f"{detail}; it cannot be written", "set HF_HOME to a writable folder")
    return Finding("cache", OK, detail)


def hub() -> list[Finding]:
    """Whether the hub can be reached, and the tokenizers are available."""
    from huggingface_hub import constants, try_to_load_from_cache

    from blip import hub as ours
    from blip.tokenizer import Tokenizer

    reached = ours.in_reach()
    if reached:
        first = Finding("hub", OK, f"{constants.ENDPOINT} can be reached")
    elif constants.HF_HUB_OFFLINE:
        first = Finding(
            "hub", MISSING, "HF_HUB_OFFLINE is set, so nothing is downloaded", "unset it to download models by name"
        )
    else:
        remedy = "use local paths for models and tokenizers, or set HTTPS_PROXY"
        first = Finding("hub", MISSING, f"{constants.ENDPOINT} cannot be reached", remedy)
    world = Finding("tokenizer", OK, f"of the synthetic world, {len(Tokenizer.load('world')):,} word pieces")
    for name in TOKENIZERS:
        if isinstance(try_to_load_from_cache(name, "tokenizer.json"), str):
            return [first, world, Finding("tokenizer", OK, f"{name} is in the local cache")]
    if reached:
        return [first, world, Finding("tokenizer", OK, f"{TOKENIZERS[0]} is downloaded when first needed")]
    remedy = f"run `hf download {TOKENIZERS[0]} tokenizer.json` with network access, or give a local vocab.txt"
    return [first, world, Finding("tokenizer", MISSING, f"{TOKENIZERS[0]} is not in the local cache", remedy)]


def _size(number: int) -> str:
    return f"{number / (1 << 30):,.1f} GB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
