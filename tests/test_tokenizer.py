import gzip
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from blip.nn.settings import TextConfig
from blip.tokenizer import Tokenizer

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), *".,'-[]"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, "dog", "cat", "run", "##ning", "photo"]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(vocab):
    return Tokenizer.load(vocab)


def test_dec_and_enc_follow_the_vocabulary(tokenizer):
    assert len(tokenizer) == len(VOCAB) + 2
    assert (tokenizer.dec_id, tokenizer.enc_id) == (len(VOCAB), len(VOCAB) + 1)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 1, 2, 3)


def test_pieces_are_wordpieces_lower_case_without_accents(tokenizer):
    words = [VOCAB[i] for i in tokenizer.pieces("Running DÓG, cät", 30)]
    assert words == ["[CLS]", "run", "##ning", "dog", ",", "cat", "[SEP]"]


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_truncation_keeps_the_last_special_token(tokenizer, length):
    ids = tokenizer.pieces("dog cat dog cat dog", length)
    assert len(ids) == length
    assert ids[0] == tokenizer.cls_id
    assert ids[-1] == tokenizer.sep_id


def test_no_room_for_special_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length"):
        tokenizer.pieces("dog", 1)


@pytest.mark.parametrize("first", ["cls", "dec", "enc"])
def test_encode_pads_on_the_right_and_says_what_is_kept(tokenizer, first):
    ids, keep = tokenizer.encode(["dog", "dog cat photo", ""], first=first, max_length=4)
    assert ids.dtype == torch.int64
    assert keep.dtype == torch.bool
    assert ids.shape == keep.shape == (3, 4)
    assert (ids[:, 0] == getattr(tokenizer, f"{first}_id")).all()
    assert keep.sum(1).tolist() == [3, 4, 2]
    assert (ids[~keep] == tokenizer.pad_id).all()
    assert ids[1, -1] == tokenizer.sep_id


def test_the_use_of_a_text_must_be_said(tokenizer):
    with pytest.raises(TypeError):
        tokenizer.encode(["dog"], max_length=4)
    with pytest.raises(KeyError):
        tokenizer.encode(["dog"], first="itm", max_length=4)


def test_special_tokens_written_in_a_caption_are_text(tokenizer):
    special = {tokenizer.sep_id, tokenizer.dec_id, tokenizer.enc_id, tokenizer.cls_id, tokenizer.pad_id}
    assert not special & set(tokenizer.pieces("dog [SEP] [DEC] [ENC] [PAD] [CLS] cat", 60)[1:-1])


def test_a_copy_sent_to_another_process_is_the_same(tokenizer):
    import pickle

    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "a running dog [SEP] cat"
    assert copy.pieces(text, 30) == tokenizer.pieces(text, 30)
    assert (len(copy), copy.enc_id, copy.where) == (len(tokenizer), tokenizer.enc_id, tokenizer.where)


def test_decode_gives_the_text_back_without_special_tokens(tokenizer):
    ids, _ = tokenizer.encode(["dog cat", "a running dog, cat's"], first="dec", max_length=30)
    assert tokenizer.decode(ids) == ["dog cat", "a running dog, cat's"]
    assert tokenizer.decode(ids.tolist()) == tokenizer.decode(ids)


def test_saved_and_loaded_it_is_the_same_and_transformers_reads_it(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    alone = Tokenizer.load(tmp_path / "saved" / "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "a running dog, cät!"
    assert again.pieces(text, 20) == alone.pieces(text, 20) == tokenizer.pieces(text, 20) == theirs(text)["input_ids"]
    assert (len(again), again.dec_id, again.enc_id) == (len(tokenizer), tokenizer.dec_id, tokenizer.enc_id)
    assert theirs.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [tokenizer.dec_id, tokenizer.enc_id]
    assert (theirs.bos_token_id, theirs.sep_token_id) == (tokenizer.dec_id, tokenizer.sep_id)


def test_check_against_a_model(tokenizer):
    config = tokenizer.text_config(TextConfig())
    tokenizer.check(config)
    assert config.vocab_size == len(tokenizer)
    with pytest.raises(ValueError, match=r"vocab_size 70, the model has 30524.*saved with the model"):
        tokenizer.check(TextConfig())


def broken(tmp_path, case):
    path = tmp_path / "vocab.txt"
    if case == "empty folder":
        return tmp_path, FileNotFoundError, "neither tokenizer.json nor vocab.txt"
    if case == "no such file":
        return path, FileNotFoundError, "not found"
    if case == "empty file":
        path.write_text("")
        return path, ValueError, "lacks"
    if case == "special tokens only":
        path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
        return path, ValueError, "only 0 word pieces"
    if case == "no [SEP]":
        path.write_text("\n".join(p for p in VOCAB if p != "[SEP]"))
        return path, ValueError, r"lacks \[SEP\]"
    if case == "repeated lines":
        path.write_text("\n".join([*VOCAB, "dog"]))
        return path, ValueError, "repeated"
    if case == "binary":
        path.write_bytes(b"\xff\xfe\x00\x80" * 100)
        return path, ValueError, "UTF-8"
    json_path = tmp_path / "tokenizer.json"
    json_path.write_text("<html>404</html>" if case == "html" else "{}")
    return json_path, ValueError, "not a tokenizer.json"


CASES = ["empty folder", "no such file", "empty file", "special tokens only", "no [SEP]", "repeated lines", "binary"]


@pytest.mark.parametrize("case", [*CASES, "html", "other json"])
def test_what_is_no_vocabulary_is_refused(tmp_path, case):
    where, error, message = broken(tmp_path, case)
    with pytest.raises(error, match=message):
        Tokenizer.load(where)


def test_other_models_than_wordpiece_are_refused(tmp_path):
    from tokenizers import Tokenizer as Raw
    from tokenizers import models

    Raw(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer.load(tmp_path)


OFFLINE = """
import socket, sys, time
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # whose import is not timed
from blip.tokenizer import Tokenizer
def refuse(*a, **k): raise AssertionError("a connection was tried")
if "OFFLINE" in sys.argv[1]: socket.create_connection = socket.socket.connect = refuse
start = time.monotonic()
try: Tokenizer.load("someone/nothing-cached-under-this-name")
except FileNotFoundError as error: print(f"{time.monotonic() - start:.2f} {error}")
"""


@pytest.mark.parametrize("mode", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "unreachable"])
def test_without_the_hub_it_fails_at_once_and_says_what_to_do(tmp_path, mode):
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and "OFFLINE" not in k}
    env |= {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {mode: "1"} if "OFFLINE" in mode else {}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", OFFLINE, mode], env=env, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 60
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < 2
    assert "hf download" in message
    assert "vocab.txt" in message


def test_unknown_rate_tells_a_wrong_vocabulary(tokenizer):
    assert tokenizer.unknown_rate(["a dog", "running cat"]) == 0
    assert tokenizer.unknown_rate(["собака и кот", "a dog"]) == pytest.approx(3 / 5)


def test_ids_of_real_captions_are_those_of_transformers(real_data):
    from transformers import BertTokenizerFast

    path = real_data / "bert_vocab" / "vocab.txt"
    ours = Tokenizer.load(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    theirs = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(lines)})
    with gzip.open(real_data / "coco_captions" / "captions_val2014.json.gz", "rt", encoding="utf-8") as file:
        captions = [c for cs in list(json.load(file).values())[:1200] for c in cs]
    captions += ["naïve façade 北京 \u200b tab\tnew\nline", "don't — “quoted” …", "x" * 300, "😀 emoji", ""]
    assert len(captions) > 6000
    assert [ours.pieces(c, 30) for c in captions] == theirs(captions, truncation=True, max_length=30)["input_ids"]
    assert (len(ours), ours.dec_id, ours.enc_id) == (30524, 30522, 30523)
    ours.check(TextConfig())
    assert ours.unknown_rate(captions[:6000]) < 1e-4
