"""Tokenization: the rules by hand and against Stanford's own answers, odd captions, and Java that does not behave."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from eval.metrics.java import NoJava
from eval.metrics.ptb import NAMES, Tokens, tokenize

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on PATH")

BY_HAND = {
    "A man (with a hat), riding.": "a man -lrb- with a hat -rrb- riding",
    "it's the dogs' bowl, isn't it? \"No!\"": "it 's the dogs bowl is n't it no",
    "they'll cannot gonna wanna": "they 'll can not gon na wan na",
    "a black-and-white cat/dog at 8:30 with 1,000 $5.00": "a black-and-white cat/dog at 8:30 with 1,000 $ 5.00",
    "St. Mark's o'clock on the U.S. t.v.": "st. mark 's o'clock on the u.s. t.v.",
    "two sentences. here it is... the end -- ok": "two sentences here it is the end ok",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2013 it\u2019s": "curly quotes it 's",
    "street 22 3/4": "street 22\u00a03/4",
    "caf\u00e9 \u4e00\u53ea \u0441\u043e\u0431\u0430": "caf\u00e9 \u4e00\u53ea \u0441\u043e\u0431\u0430",
    "a cat \U0001f408 sits": "a cat sits",
    "M&Ms and AT&T but a&b": None,
    "...": "",
    "": "",
}
ODD = {
    "carriage return": "a dog\ra cat",
    "carriage return and line feed": "a dog\r\na cat",
    "line feeds": "a\n\nb\n",
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "vertical tab and form feed": "a\vb\fc",
    "next line and the separators of files": "a\x85b\x1cc\x1dd\x1ee\x1ff",
    "other controls": "a\x00b\x01c\x08d\x1ae\x7ff\tg",
    "nothing": "",
    "only spaces": "   ",
    "only punctuation": "... -- !?! ;;; ''",
    "emoji": "\U0001f408\u200d\u2b1b a cat \U0001f600",
    "ten thousand words": "word " * 10_000,
    "quotes and brackets": "\"'``((([[[{{{<b>a</b> <!-- <? )",
    "not Latin": "\u4e00\u53ea\u72d7 \u0643\u0644\u0628 \u0441\u043e\u0431\u0430\u043a\u0430 e\u0301 \ufeff",
    "half a surrogate": "a \ud800 b",
    "what the programs take for markers": "*NL* *CR* ||| SCORE ||| EVAL",
    "one long word": "a" * 100_000,
    "an open tag": 'a < b <c "',
    "the line between": "A",
    "an abbreviation at the end": "a sign that says K.",
}
NORMAL = ["A man rides a horse.", "a sign that reads st.", "Two dogs play on the beach", "He lives at no. 5 on J."]


def fake_java(folder: Path, monkeypatch, script: str) -> Path:
    """A `java` that runs a shell script instead; the ids of its processes go to the file that is returned."""
    bin_, pids = folder / "bin", folder / "pids"
    bin_.mkdir()
    (bin_ / "java").write_text(f"#!/bin/sh\necho $$ >> {pids}\n" + script.replace("PIDS", str(pids)))
    (bin_ / "java").chmod(0o755)
    pids.touch()
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    return pids


def no_java(folder: Path, monkeypatch) -> None:
    (folder / "empty").mkdir()
    monkeypatch.setenv("PATH", str(folder / "empty"))


def running(pid: int) -> bool:
    """Whether a process is there and not only waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def nothing_runs(pids: Path) -> bool:
    started = [int(line) for line in pids.read_text().split()]
    assert started, "the fake was not called"
    end = time.monotonic() + 5  # killing is not instant
    while any(map(running, started)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(running, started))


@pytest.mark.parametrize("caption", BY_HAND)
def test_tokens_by_hand(caption):
    expected = BY_HAND[caption] if BY_HAND[caption] is not None else "m&ms and at&t but a & b"
    assert tokenize([caption], "python") == Tokens([expected], NAMES["python"], "")


def test_tokens_of_coco_as_the_official_code_made_them(real_data):
    cases = json.loads((real_data / "eval_references" / "human_leaveoneout_val2017_5000.cases.json").read_text())
    texts = [text for case in cases for text in (case["candidate"], *case["references"])]
    theirs = [text for case in cases for text in (case["candidate_ptb"], *case["references_ptb"])]
    ours = tokenize(texts, "python").texts
    different = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert len(texts) == 25_014
    assert len(different) <= 1, different


@needs_java
def test_java_and_the_rules_agree(real_data):
    rows = json.loads((real_data / "photos" / "photos.json").read_text())
    captions = [caption for row in rows for caption in row["captions"]] + [c for c in BY_HAND if "M&M" not in c]
    by_java, by_rules = tokenize(captions, "java"), tokenize(captions, "python")
    assert (by_java.tokenizer, by_java.fallback) == (NAMES["java"], "")
    assert by_java.texts == by_rules.texts


def sandwiches() -> tuple[list[str], list[int]]:
    """Odd captions between normal ones, and where the normal ones are."""
    captions, places = [], []
    for odd in ODD.values():
        for normal in NORMAL:
            places.append(len(captions))
            captions += [normal, odd]
    return captions, places


@pytest.mark.parametrize("tokenizer", [pytest.param("java", marks=needs_java), "python"])
def test_odd_captions_change_no_other_caption(tokenizer):
    alone = [tokenize([caption], tokenizer).texts[0] for caption in NORMAL]
    assert alone[0] == "a man rides a horse"
    captions, places = sandwiches()
    tokenized = tokenize(captions, tokenizer).texts
    assert [tokenized[i] for i in places] == alone * len(ODD)
    odd = dict(zip(ODD, tokenized[1 :: 2 * len(NORMAL)], strict=True))
    assert odd["nothing"] == odd["only spaces"] == ""
    assert odd["ten thousand words"] == ODD["ten thousand words"].strip()
    assert odd["carriage return"] == odd["carriage return and line feed"] == "a dog a cat"
    assert not any("\n" in text or "\r" in text for text in tokenized)


def test_no_captions_are_no_tokens():
    for choice in ("auto", "python"):
        assert tokenize([], choice).texts == []


ILL = {
    "absent": (None, "no java on PATH"),
    "not a program": ("", "cannot be started"),
    "status": ("echo 'Error: no heap' >&2; echo >&2; exit 3", "ended with status 3: Error: no heap"),
    "too few lines": ("echo a man; echo a", "answered 2 lines for 4"),
    "too many lines": ("for i in 1 2 3 4 5 6; do echo a; done", "answered 6 lines for 4"),
    "nothing": ("exit 0", "answered 0 lines"),
    "the wrong lines": ("echo a; echo x; echo b; echo a", "others' lines"),
    "kills itself": ("kill -9 $$", "killed by signal 9"),
    "hangs": ("sleep 300", "did not end within 1 seconds"),
    "hangs with children": ("sleep 301 & echo $! >> PIDS; (sleep 302) & echo $! >> PIDS; wait", "within 1 seconds"),
    "ignores signals": ("trap '' TERM INT HUP; sleep 303 & echo $! >> PIDS; while :; do sleep 1; done", "1 seconds"),
    "leaves a child": ("sleep 304 & echo $! >> PIDS; echo a; echo a", "answered 2 lines"),
    "never stops talking": ("while :; do echo a; done", "within 1 seconds"),
}


@pytest.mark.parametrize("name", ILL)
def test_java_that_does_not_behave_is_done_without(name, tmp_path, monkeypatch):
    script, reason = ILL[name]
    captions, pids = ["A man.", "a dog"], None
    if script is None:
        no_java(tmp_path, monkeypatch)
    else:
        pids = fake_java(tmp_path, monkeypatch, script)
    if name == "not a program":
        (tmp_path / "bin" / "java").write_bytes(b"\x7fELF and nothing else")
        pids = None
    before = set(Path("/tmp").glob("openblip-java-*"))
    start = time.monotonic()
    tokenized = tokenize(captions, "auto", seconds=1)
    assert time.monotonic() - start < 20, "a deadline, not a speed"
    assert tokenized.texts == ["a man", "a dog"]
    assert tokenized.tokenizer == NAMES["python"]
    assert reason in tokenized.fallback
    assert "\n" not in tokenized.fallback
    assert pids is None or nothing_runs(pids)
    with pytest.raises(NoJava, match="tokenizer java: "):
        tokenize(captions, "java", seconds=1)
    assert set(Path("/tmp").glob("openblip-java-*")) <= before


def test_java_gets_cleaned_lines_and_a_fixed_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.setenv("_JAVA_OPTIONS", "-Dfile.encoding=ISO-8859-9")
    pids = fake_java(
        tmp_path,
        monkeypatch,
        f'echo "$@" > {tmp_path}/said; env > {tmp_path}/env; pwd > {tmp_path}/folder\n'
        f"cp captions.txt {tmp_path}/given; tr A a < captions.txt",
    )
    assert tokenize(["\u00e9 x\r\ny", "b\u2028c\0d"], "java").texts == ["\u00e9 x y", "b c d"]
    assert (tmp_path / "given").read_bytes().decode() == "\u00e9 x y\nA\nb c d\nA\n"
    received, environment = (tmp_path / "said").read_text(), (tmp_path / "env").read_text()
    assert "-Dfile.encoding=UTF-8" in received
    assert "-Duser.language=en" in received
    assert "LC_ALL=C.UTF-8" in environment
    assert "_JAVA_OPTIONS" not in environment
    folder = Path((tmp_path / "folder").read_text().strip())
    assert "site-packages" not in str(folder)
    assert not folder.exists()
    assert nothing_runs(pids)


def test_an_interrupt_ends_java_too(tmp_path, monkeypatch):
    pids = fake_java(tmp_path, monkeypatch, "sleep 305 & echo $! >> PIDS; sleep 1; kill -INT $PPID; wait")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this in background
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenize(["a"], "auto", seconds=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert nothing_runs(pids)
