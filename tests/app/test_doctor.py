"""`blip doctor`: what it finds here, against other ways to find it out, and what it says when something is off."""

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from blip import hub, installed
from blip.app import cli, doctor
from blip.app.doctor import MISSING, OK, UNTESTED, WRONG, Finding, works

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nobody asks a network; how long that may take is told where it matters."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)

    def refuse(*_, **__):
        raise AssertionError("somebody tried to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def named(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


# What is installed


def test_what_is_asked_for_is_what_the_project_file_says():
    for extra, lines in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items():
        wanted = {re.match(r"[\w-]+", line)[0] for line in lines}
        assert {package.name for package in installed.packages(extra)} == wanted
    torch_package = next(package for package in installed.packages() if package.name == "torch")
    assert (torch_package.version, torch_package.fits) == (importlib.metadata.version("torch"), True)
    assert torch_package.wanted == ">=2.11"
    with pytest.raises(LookupError, match="no extra 'nonsense'"):
        installed.packages("nonsense")


def test_the_tested_series_are_those_of_the_documentation():
    page = (ROOT / "CONTRIBUTING.md").read_text().replace("\n", " ")
    for name, (oldest, newest) in installed.TESTED.items():
        assert f"{name} {oldest} to {newest}" in page


@pytest.mark.parametrize(("version", "fits"), [(None, False), ("2.10.0", False), ("2.11.0", True), ("2.16.0", True),
                                               ("2.15.0+cu130", True), ("2.12.0rc1", True)])  # fmt: skip
def test_versions_are_held_against_the_range(monkeypatch, version, fits):
    monkeypatch.setattr(installed, "_version", lambda name: version if name == "torch" else "99")
    (torch_package,) = [package for package in installed.packages() if package.name == "torch"]
    assert torch_package.fits == fits
    wrong = [finding for finding in doctor.core() if finding.status == WRONG]
    assert [finding.name for finding in wrong if finding.name == "torch"] == ["torch"] * (not fits)
    if not fits:
        (one,) = named(wrong, "torch")
        assert (version or "not installed") in one.said
        assert one.remedy == "pip install 'torch>=2.11'"


def test_a_package_that_cannot_be_imported_is_wrong(monkeypatch):
    real = doctor.importlib.import_module

    def broken(name):
        if name == "torchvision":
            raise OSError("libcudart.so.13: cannot open shared object file\nmore")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    (one,) = [finding for finding in doctor.core() if finding.status == WRONG]
    assert one.name == "torchvision"
    assert "libcudart" in one.said
    assert "\n" not in one.said


def test_extras_are_missing_and_not_wrong(monkeypatch):
    monkeypatch.setattr(installed, "_version", lambda name: {"ray": "1.0"}.get(name))
    findings = doctor.extras()
    assert {finding.status for finding in findings} == {MISSING}
    for_work_on_the_project = {"dev", "docs", "notebook", "browser", "readers"}
    assert {finding.name for finding in findings} == set(PROJECT["optional-dependencies"]) - for_work_on_the_project
    (ray,) = named(findings, "ray")
    assert "1.0 is too old" in ray.said
    assert ray.remedy == "pip install 'ray>=2.40'"


def test_series_that_are_not_tested_are_told():
    newer = doctor.tested("torch", "2.16.1")
    assert (newer.status, newer.remedy) == (UNTESTED, "if something fails: pip install 'torch~=2.15.0'")
    assert "may work as well" in newer.said
    assert works([newer])
    assert doctor.tested("torch", "2.11.0+cpu").status == OK
    assert "may work as well" not in doctor.tested("torch", "2.11.0+cpu").said
    assert "may work as well" in doctor.tested("transformers", "5.4.0").said


@pytest.mark.parametrize(("version", "is_reported"), [
    ((3, 11, 9, "final", 0), True), ((3, 11, 10, "final", 0), False), ((3, 12, 5, "final", 0), True),
    ((3, 12, 6, "final", 0), False), ((3, 13, 0, "candidate", 1), True), ((3, 13, 0, "candidate", 2), False),
    ((3, 13, 1, "final", 0), False), ((3, 14, 0, "final", 0), False),
])  # fmt: skip
def test_a_tarfile_that_an_archive_can_hold_up_is_told(monkeypatch, version, is_reported):
    """The releases of the advisory on CVE-2024-6232; the core works with the others, too."""
    monkeypatch.setattr(doctor.sys, "version_info", version)
    findings = named(doctor.python(), "tarfile")
    assert [finding.status for finding in findings] == [OK] * is_reported
    if is_reported:
        assert "CVE-2024-6232" in findings[0].said
        assert "3.11.10, 3.12.6 or newer" in findings[0].remedy


# Java


def program(folder: Path, text: str) -> None:
    (folder / "java").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "java").chmod(0o755)


@pytest.mark.parametrize(("text", "status", "message"), [
    ("echo 'openjdk version \"17.0.9\"' >&2", OK, '"17.0.9"'),
    ("exit 3", MISSING, "ends with status 3"),
    ("sleep 60", MISSING, "does not run"),
    ("printf '\\377\\n' >&2", OK, "for METEOR"),
])  # fmt: skip
def test_java_of_all_kinds(monkeypatch, tmp_path, text, status, message):
    program(tmp_path, text)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    start = time.monotonic()
    (finding,) = doctor.java(seconds=1)
    assert time.monotonic() - start < 8
    assert finding.status == status
    assert message in finding.said


def test_no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = doctor.java()
    assert finding.status == MISSING
    assert "apt-get install" in finding.remedy


# Hardware


def test_cores_and_memory(monkeypatch, tmp_path):
    (finding,) = doctor.cores()
    assert (
        f"{torch.get_num_threads()} compute threads; {len(os.sched_getaffinity(0))} of {os.cpu_count()}" in finding.said
    )
    files = {"/sys/fs/cgroup/cpu.max": "50000 100000", "/sys/fs/cgroup/memory.max": str(1 << 30)}
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    (finding,) = doctor.cores()
    assert "limited to 0.5 by the container" in finding.said
    assert "OMP_NUM_THREADS=1" in finding.remedy
    (finding,) = doctor.memory()
    assert "limited to 1.0 GB by the container" in finding.said
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert "limit" not in doctor.cores()[0].said


def test_the_device_and_its_precision(monkeypatch):
    from blip.train import precision as formats

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for yes, word in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(formats, "multiplies_bfloat16", lambda device, yes=yes: yes)
        device, precision = doctor.hardware()
        assert device.said.startswith("cpu ")
        assert f"training in {word}" in precision.said


def test_a_gpu(monkeypatch):
    from types import SimpleNamespace

    from blip.train import precision as formats

    card = SimpleNamespace(name="A Card", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(formats, "multiplies_bfloat16", lambda device: False)
    findings = doctor.hardware()
    assert [finding.said for finding in findings[:2]] == [
        f"cuda:{i} A Card, 80.0 GB, no bfloat16: use float16" for i in range(2)
    ]


# Disk and hub


def test_disk(monkeypatch, tmp_path):
    finding = doctor.disk(tmp_path / "not" / "there")
    assert finding.status == OK
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    finding = doctor.disk(tmp_path / "file" / "runs")
    assert finding.status == WRONG
    assert "--out DIR" in finding.remedy
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError(13, "no")))
    finding = doctor.disk(tmp_path)
    assert (finding.status, f"{tmp_path} cannot be written (no)") == (WRONG, finding.said)
    monkeypatch.undo()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda at: shutil._ntuple_diskusage(1, 1, 1 << 20))
    assert "3 GB" in doctor.disk(tmp_path).remedy


def test_the_hub_is_not_asked_when_it_is_off_and_not_waited_for(monkeypatch):
    first, world, words = doctor.hub()
    assert (first.status, world.status) == (MISSING, OK)
    assert "HF_HUB_OFFLINE is set" in first.said
    assert words.status in (OK, MISSING)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.socket, "create_connection", lambda *_: time.sleep(12) or socket.socket())
    start = time.monotonic()
    first, *_ = doctor.hub()
    assert time.monotonic() - start < 10
    assert first.status == MISSING
    assert "cannot be reached" in first.said


def test_a_tokenizer_in_the_cache_is_found(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    assert doctor.hub()[-1].status == MISSING
    assert "hf download google-bert/bert-base-uncased" in doctor.hub()[-1].remedy
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: str(tmp_path) if "/" not in name else None
    )
    assert doctor.hub()[-1].said == "bert-base-uncased is in the local cache"


# The command


def test_a_check_that_fails_is_told_and_the_others_go_on(monkeypatch):
    def ill():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "memory", ill)
    findings = list(doctor.examine(Path("runs")))
    (failed,) = [finding for finding in findings if finding.status == WRONG]
    assert failed.said == "check failed: RuntimeError: two"
    assert not works(findings)
    assert {"python", "packages", "device", "cores", "disk", "cache", "hub", "tokenizer", "java"} <= {
        finding.name for finding in findings
    }


def test_the_command(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "ok       packages" in out
    assert re.search(r"^ok +device +c(pu|uda)", out, re.MULTILINE)
    assert "HF_HUB_OFFLINE is set" in out
    assert out.endswith("The core works.\n")
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["doctor", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["works"] is True
    assert {frozenset(finding) for finding in printed["findings"]} == {frozenset(("name", "status", "said", "remedy"))}
    (tmp_path / "file").touch()
    assert cli.main(["doctor", "--out", "file"]) == 1
    out = capfd.readouterr().out
    assert re.search(r"^wrong +disk", out, re.MULTILINE)
    assert out.endswith("The core does not work; see what is wrong above.\n")
    assert cli.main(["doctor", "--out", "file", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["works"] is False


def test_it_answers_where_torch_cannot_be_imported(tmp_path):
    """The one command that is asked when nothing works."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "blip.app.cli", "doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"^wrong +torch +.*libtorch is broken", done.stdout, re.MULTILINE)
    assert re.search(r"^ok +java|^missing +java", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stderr
