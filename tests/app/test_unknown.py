"""Words that the tokenizer does not know: what is counted, what is said and what is refused."""

import pytest
from test_cli import model, photos  # noqa: F401
from test_search import run  # noqa: F401

from blip.app import unknown
from blip.tokenizer import Tokenizer

RUSSIAN, CHINESE = "красная звезда", "红色的星星"
COMMANDS = {
    "match": ("match", "photos/p2.png", "{}"),
    "search": ("search", "photos", "{}"),
    "classify": ("classify", "photos/p2.png", "--classes", "{},ring"),
    "explain": ("explain", "photos/p2.png", "{}", "--out", "explained.html"),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red star", (0, 3)),
        ("a red звезда", (1, 3)),
        (RUSSIAN, (2, 2)),
        ("красная, звезда", (2, 2)),
        (CHINESE, (5, 5)),  # a piece for each character, as BERT's tokenizer splits Chinese
        ("a red \N{DOG FACE}", (1, 3)),
        ("[UNK] a", (0, 4)),  # text like any other: u ##n ##k a
        ("a < b", (0, 2)),
        ("", (0, 0)),
    ],
)
def test_word_pieces_are_counted(text, expected):
    assert Tokenizer.load("world").unknown_pieces(text) == expected


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", [RUSSIAN, CHINESE, "\N{DOG FACE}"])
def test_a_text_of_unknown_words_is_refused(run, photos, command, text):  # noqa: F811
    before = sorted(photos.parent.rglob("*"))
    status, out, err = run(*(part.format(text) for part in COMMANDS[command]))
    assert (status, out) == (2, "")
    assert err.startswith("error: all word pieces of ")
    assert f"{text!r} are unknown to this model's tokenizer" in err
    assert err.count("\n") == 1
    assert sorted(photos.parent.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_text_with_unknown_words_is_answered_and_named(run, photos, command):  # noqa: F811
    status, out, err = run(*(part.format("a red звезда") for part in COMMANDS[command]))
    assert status == 0
    assert out
    what = "class " if command == "classify" else ""
    assert f"note: 1 of 3 word pieces of {what}'a red звезда' are unknown to this model's tokenizer\n" in err


def test_of_many_texts_a_few_are_named(capsys):
    unknown.check_texts(Tokenizer.load("world"), [f"a {number} звезда" for number in range(9)] + ["a star"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[-1] == "note: 4 more texts have unknown word pieces"


def test_questions_are_checked_as_they_are_read(capsys):
    tokenizer = Tokenizer.load("world")
    unknown.check_question(tokenizer, "what COLOUR is the star?")
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="of the question 'где звезда\\?' are unknown"):
        unknown.check_question(tokenizer, "где звезда?")
