"""Clips by a model of images: against transformers' parts, clips that have to equal images, and the commands."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stub_run import the_zygote
from test_cli import model as model_folder  # noqa: F401
from test_parity import close, matcher, model  # noqa: F401

import blip
from blip import dist
from blip.checkpoints import checkpoint
from blip.inference.answering import Candidates, answers, encode_questions
from blip.inference.matching import match
from blip.inference.settings import AnswerConfig
from blip.models.presets import TINY
from blip.models.video import clip_tokens, embed_clip
from blip.models.vqa import Vqa
from blip.tokenizer import Tokenizer
from blip.world.clips import ANSWERS, write
from eval.__main__ import main
from eval.clips import batches, read_clips, read_questions
from eval.retrieval import results
from eval.video_questions import accuracy, answers_about_clips
from eval.video_retrieval import gallery_of, rank_clips

pytest.importorskip("av", reason="needs the extra `video`")


@pytest.fixture(scope="module")
def frames():
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


IDS = torch.tensor([[98, 40, 7, 3, 0], [98, 9, 12, 60, 3]])
KEEP = torch.tensor([[True] * 4 + [False], [True] * 5])


@torch.no_grad()
def test_embedding_and_matching_are_the_originals(model, matcher, frames):  # noqa: F811
    """Mean of projected class tokens, normalised last; ITM over all tokens."""
    tokens = clip_tokens(model.vision, frames)
    assert tokens.shape == (2, 3 * 17, 32)
    states = [matcher.vision_model(clip).last_hidden_state for clip in frames]
    expected = torch.stack([F.normalize(matcher.vision_proj(each[:, 0]).mean(0), dim=0) for each in states])
    close(embed_clip(model, tokens, 3), expected)
    early = torch.stack([F.normalize(matcher.vision_proj(each[:, 0]), dim=1).mean(0) for each in states])
    assert (F.normalize(early, dim=1) - expected).abs().max() > 1e-4, "the test tells early from late normalising"
    clip_logits = match(model, tokens, IDS, KEEP, [torch.tensor([0, 1])] * 2)
    for logits, each in zip(clip_logits, states, strict=True):
        for row in range(2):
            ids = IDS[row : row + 1, : int(KEEP[row].sum())]
            state = matcher.text_encoder(ids, encoder_hidden_states=each.reshape(1, -1, 32)).last_hidden_state[:, 0]
            close(logits[row], matcher.itm_head(state)[0])


@torch.no_grad()
def test_a_still_clip_is_an_image_and_the_order_does_not_matter(model, frames):  # noqa: F811
    still = clip_tokens(model.vision, frames[:, :1].expand(-1, 4, -1, -1, -1))
    image = model.vision(frames[:, 0])
    chosen = [torch.tensor([0, 1])] * 2
    close(embed_clip(model, still, 4), model.embed_image(image))
    pairs = zip(match(model, still, IDS, KEEP, chosen), match(model, image, IDS, KEEP, chosen), strict=True)
    for a, b in pairs:
        close(a, b)
    forward, back = clip_tokens(model.vision, frames), clip_tokens(model.vision, frames.flip(1))
    close(embed_clip(model, forward, 3), embed_clip(model, back, 3))
    for a, b in zip(match(model, forward, IDS, KEEP, chosen), match(model, back, IDS, KEEP, chosen), strict=True):
        close(a, b)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five clips with captions and questions."""
    folder = tmp_path_factory.mktemp("clips")
    write(folder, count=5, length=6)
    return folder


def ranked(model: str, folder: str, out: str) -> None:  # noqa: F811
    """What each of two processes does."""
    dist.start(60)
    loaded, tokenizer = checkpoint.from_pretrained(model)
    clips = read_clips(Path(folder) / "test.json", Path(folder) / "videos")
    for batch in (1, 2, 9):
        gallery = gallery_of(clips, 64, frames=3, batch=batch)
        ranking = rank_clips(loaded, tokenizer, gallery, frames=3, k=4, batch=7)
        with open(f"{out}-{batch}-{dist.rank()}", "w") as file:
            file.write(results(gallery.ids, gallery.texts, gallery.image_of_text, ranking, "video_id", "videos"))


def test_ranking_is_that_of_each_pair_alone_in_any_number_of_processes(model_folder, world, tmp_path):  # noqa: F811
    arguments = {"model": model_folder, "folder": str(world)}
    zygote = the_zygote()
    pids = zygote.spawn(
        tmp_path / "log", world=2, module="test_video", function="ranked", out=str(tmp_path / "2"), **arguments
    )
    assert [zygote.wait(pid, 300) for pid in pids] == [0, 0], (tmp_path / "log-0").read_text()
    ranked(**arguments, out=str(tmp_path / "1"))
    for batch in (1, 2, 9):
        alone = (tmp_path / f"1-{batch}-0").read_text()
        assert alone == (tmp_path / f"2-{batch}-0").read_text() == (tmp_path / f"2-{batch}-1").read_text()
    loaded, tokenizer = checkpoint.from_pretrained(model_folder)
    clips = read_clips(world / "test.json", world / "videos")
    gallery = gallery_of(clips, 64, frames=3)
    ranking = rank_clips(loaded, tokenizer, gallery, frames=3, k=99)
    assert ranking.scores.shape == (5, 25)
    with torch.no_grad():
        for i, shown in enumerate(batches(clips, range(5), 1, 3, 64)):
            tokens = clip_tokens(loaded.vision, shown)
            for j in (0, 7, 24):
                text = gallery.texts[j]
                embed = loaded.embed_text(*tokenizer.encode([text], first="cls", max_length=35))
                logits = loaded.match(*tokenizer.encode([text], first="enc", max_length=35), loaded.context(tokens))
                cosine = (embed_clip(loaded, tokens, 3) @ embed.T)[0, 0]
                close(ranking.scores[i, j], logits[0, 1] + cosine)


def test_retrieval_command(model_folder, world, tmp_path, capsys):  # noqa: F811
    args = ["video_retrieval", "--model", model_folder, "--clips", str(world / "test.json"), "--device", "cpu"]
    args += ["--frames", "2", "--video_root", str(world / "videos")]
    main([*args, "--out", str(tmp_path / "out"), "--limit", "4"])
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert (scores["videos"], scores["texts"], scores["frames"]) == (4, 20, 2)
    assert {"tr@1", "ir@1", "ir@10_itc", "mean_recall"} <= scores.keys()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["video_id"] for row in results["texts_of_video"]] == [f"world-clip-0-test-{i:06d}" for i in range(4)]
    assert len(results["videos_of_text"][0]["videos"]) == 4
    assert "ir@1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*args, "--split", "val"])
    assert stop.value.code == 2
    assert "no clips of split 'val'" in capsys.readouterr().err


# Questions


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    tokenizer = Tokenizer.load("world")
    torch.manual_seed(5)
    made = Vqa(blip.BlipConfig(TINY.vision, tokenizer.text_config(TINY.text), TINY.embed_dim)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for block in (*made.question.blocks, *made.answer.blocks):
            block.cross.kv.weight.mul_(4)
    folder = tmp_path_factory.mktemp("vqa") / "model"
    checkpoint.save_pretrained(made, tokenizer, folder)
    return str(folder)


def test_questions_are_answered_over_all_frames(answerer, world):
    loaded, tokenizer = checkpoint.from_pretrained(answerer, Vqa)
    clips, questions = read_questions(world / "test_qa.json", world / "videos")
    for candidates in (Candidates(ANSWERS, tokenizer), None):
        config = AnswerConfig(max_length=6)
        answered = answers_about_clips(loaded, tokenizer, clips, questions, config, candidates, frames=2, batch=2)
        assert len({round(one.logprob, 3) for one in answered}) > 10, "the test needs answers that differ"
        for row in (0, 7, 29):
            (shown,) = batches(clips, [questions[row].clip], 1, 2, 64)
            with torch.no_grad():
                tokens = torch.cat([loaded.vision(shown[0, n : n + 1]) for n in range(2)], dim=1)
            context = encode_questions(loaded, tokenizer, tokens, [questions[row].question], [0])
            ((alone,),) = answers(loaded, tokenizer, context, config, candidates)
            assert answered[row].text == alone.text
            assert answered[row].logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_accuracy_evens_out_spelling(world):
    _, questions = read_questions(world / "test_qa.json", world / "videos")
    given = [question.answer for question in questions]
    assert set(accuracy(questions, given).values()) == {100.0}
    number = next(i for i, question in enumerate(questions) if question.question.startswith("how"))
    given[number] = {"1": "One.", "2": "two", "3": "Three"}[given[number]]
    assert accuracy(questions, given)["accuracy"] == 100
    given[number] = "many"
    scores = accuracy(questions, given)
    assert scores["accuracy"] == pytest.approx(100 * 29 / 30)
    assert scores["accuracy_how"] == pytest.approx(80)
    assert set(scores) == {"accuracy", "accuracy_which", "accuracy_what", "accuracy_how", "accuracy_does"}


def test_questions_command(answerer, world, tmp_path, capsys):
    (tmp_path / "answers.json").write_text(json.dumps(list(ANSWERS)))
    args = ["video_questions", "--model", answerer, "--questions", str(world / "test_qa.json"), "--device", "cpu"]
    args += ["--video_root", str(world / "videos"), "--frames", "2", "--candidates", str(tmp_path / "answers.json")]
    main([*args, "--out", str(tmp_path / "out"), "--limit", "2"])
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert (scores["videos"], scores["questions"], len(rows)) == (2, 12, 12)
    assert {row["answer"] for row in rows} <= set(ANSWERS)
    assert "accuracy_what" in capsys.readouterr().out
