"""The options of `blip-eval`. Light to import, as all is that `--help` needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip.data.settings import Dialogues, PictureQuestions, PictureSentences, SourceConfig
from blip.inference.settings import CAPTION_PROMPT, DECODE_PRESETS, AnswerConfig, DecodeConfig


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """What a model runs on."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` is a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products; `auto` is float32, with which results do not depend on the batch."""


@dataclass(frozen=True, kw_only=True)
class _Resampled:
    """How far scores may be from those of other data of the kind."""

    resamples: int = 1000
    """Bootstrap draws for the 95% intervals; 0 for none."""
    seed: int = 0
    """Of those draws."""

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise ValueError("resamples must be 0 or more")


@dataclass(frozen=True)
class Captioning(_Resampled, _Machine):
    """Score captions that are there (--results), or write them with a model (--model) and score those."""

    results: str | None = None
    """Captions to score: JSON list of {"image_id", "caption"}, as COCO's server takes it."""
    references: str | None = None
    """File of reference captions: COCO's annotations, {id: [captions]}, or a list of {image, image_id, caption};
    those of the source when not given."""
    model: str | None = None
    """Model that writes: a folder, or a name on the hub."""
    source: SourceConfig | None = None
    """Pictures, with their captions if there are any: `--source.path FILE --source.image_root FOLDER`."""
    preset: Literal["caption_2022", "greedy", "nucleus", "capfilt_2022"] = "caption_2022"
    """Ways of writing, which `--decode.` options change."""
    decode: DecodeConfig = field(default_factory=lambda: DECODE_PRESETS["caption_2022"])
    """How captions are written"""
    prompt: str = CAPTION_PROMPT
    """What captions go on from; "" for a model that was trained without."""
    limit: int | None = None
    """Pictures of the source to use, from the first on; all when not given."""
    batch: int = 32
    """Pictures that are captioned at once."""
    threads: int = 2
    """Threads that decode pictures."""
    out: str | None = None
    """Folder for results.json, scores.json and captions.html; required with --model."""
    tokenizer: Literal["auto", "java", "python"] = "auto"
    """Who splits captions into words: Stanford's (needs Java), the rules here, or Java if it answers."""
    meteor: bool = True
    """Compute METEOR if there is Java; it starts in some 15 seconds."""
    spice: bool = True
    """Compute SPICE if there is Java and its parser."""
    spice_folder: str | None = None
    """Folder of spice-1.0.jar with lib/; pycocoevalcap's when not given."""
    java_timeout: float = 300.0
    """Seconds after which a Java program is ended."""
    allow_partial: bool = False
    """Score the images that have a result although others of the references have none."""
    shown: int = 60
    """Pictures on the page, half of them the best by CIDEr, half the worst."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, batch=self.batch, threads=self.threads, java_timeout=self.java_timeout)
        super().__post_init__()
        if self.shown < 0:
            raise ValueError("shown must be 0 or more")
        if (self.results is None) == (self.model is None):
            raise ValueError("give either --results FILE, captions to score, or --model DIR, which writes them")
        if self.model and self.source is None:
            raise ValueError("--model needs pictures: --source.path FILE")
        if self.model and self.out is None:
            raise ValueError("--model needs --out DIR, where the captions are kept")
        if self.results and self.references is None and self.source is None:
            raise ValueError("--results needs --references FILE (or --source.path FILE), what people wrote")


@dataclass(frozen=True)
class Retrieval(_Machine):
    """Measure image-text retrieval: recall at 1, 5 and 10 both ways, by ITC and re-ranked by ITM."""

    model: str
    """A folder, or a name on the hub."""
    source: SourceConfig
    """Pictures with their captions."""
    limit: int | None = None
    """Pictures to use, from the first on; all when not given."""
    k: int = 128
    """Candidates that are re-ranked."""
    max_tokens: int = 35
    """Word pieces kept of a caption."""
    batch: int = 50
    """Pictures that are read at once."""
    out: str | None = None
    """Folder for scores.json and results.json, what was found for each picture and text."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, k=self.k, max_tokens=self.max_tokens, batch=self.batch)


@dataclass(frozen=True)
class VideoRetrieval(_Machine):
    """Measure text-video retrieval by a model of images: recall at 1, 5 and 10, by ITC and re-ranked by ITM."""

    model: str
    """A folder, or a name on the hub."""
    clips: str
    """List of clips with captions: MSR-VTT's {videos, sentences}, or rows of {video, caption} as JSON, lines or CSV."""
    video_root: str | None = None
    """Folder of the videos; the list's own folder when not given."""
    split: str | None = None
    """Split to take where the list has several."""
    limit: int | None = None
    """Clips to use, from the first on; all when not given."""
    frames: int = 8
    """Frames of a clip that are looked at, evenly spaced."""
    k: int = 128
    """Candidates that are re-ranked."""
    max_tokens: int = 35
    """Word pieces kept of a caption."""
    batch: int = 4
    """Clips that go through the image encoder at once."""
    out: str | None = None
    """Folder for scores.json and results.json, what was found for each clip and text."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, frames=self.frames, k=self.k, max_tokens=self.max_tokens, batch=self.batch)


@dataclass(frozen=True)
class VideoQuestions(_Machine):
    """Measure question answering about videos by a model of images and questions: how often its answer is the one."""

    model: str
    """A folder, or a name on the hub."""
    questions: str
    """Questions as in MSR-VTT-QA and MSVD-QA: rows of {video_id, question, answer} as JSON or lines."""
    video_root: str | None = None
    """Folder of the videos; the list's own folder when not given."""
    candidates: str | None = None
    """File of answers to choose from, a JSON list or one a line; the model's answers.json when not given."""
    method: Literal["auto", "rank", "generate"] = "auto"
    """`rank` chooses among candidates, `generate` searches for words; `auto` ranks where there are candidates."""
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    """How a question is answered"""
    limit: int | None = None
    """Clips to use, from the first on; all when not given."""
    frames: int = 8
    """Frames of a clip that are looked at, evenly spaced."""
    batch: int = 4
    """Clips that go through the image encoder at once."""
    out: str | None = None
    """Folder for scores.json and results.json, the answers."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, frames=self.frames, batch=self.batch)


@dataclass(frozen=True)
class Classification(_Machine):
    """Measure zero-shot classification of pictures that are sorted into a folder for each class."""

    model: str
    """A folder, or a name on the hub."""
    source: str
    """Folder of the classes' folders, SOURCE/CLASS/picture.jpg."""
    names: str | None = None
    """JSON file of {"folder": "name of the class"}; the folders' names when not given, with spaces for underscores."""
    templates: str | None = None
    """File of prompt templates, one a line, {} where the name of the class goes; seven of ours when not given."""
    batch: int = 32
    """Pictures that go through the model at once."""
    out: str | None = None
    """Folder for scores.json and results.json, what was found for each picture."""

    def __post_init__(self) -> None:
        _positive(batch=self.batch)


@dataclass(frozen=True)
class Nlvr(_Resampled, _Machine):
    """Measure whether sentences about several pictures are told true from false: NLVR2, NLVR's three boxes."""

    source: PictureSentences
    """Sentences with their pictures and labels."""
    model: str | None = None
    """Model that answers: a folder, or a name on the hub."""
    results: str | None = None
    """Answers to score instead: CSV of ID,True or ID,False, as the official scripts take it."""
    limit: int | None = None
    """Examples to use, from the first on; all when not given."""
    batch: int = 32
    """Examples that go through the model at once."""
    out: str | None = None
    """Folder for results.csv and scores.json; required with --model."""
    allow_partial: bool = False
    """Score the examples that have an answer although others have none."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, batch=self.batch)
        super().__post_init__()
        _one_of(self.model, self.results, "answers", self.out)


@dataclass(frozen=True)
class Visdial(_Machine):
    """Measure where the right answers of visual dialogues are ranked: MRR, recall, mean rank, NDCG."""

    source: Dialogues
    """Dialogues in the format of VisDial v1.0."""
    model: str | None = None
    """Model that ranks: a folder, or a name on the hub."""
    results: str | None = None
    """Ranks to score instead: JSON list of {"image_id", "round_id", "ranks"}, as EvalAI takes it."""
    limit: int | None = None
    """Dialogues to use, from the first on; all when not given."""
    max_tokens: int | None = None
    """Word pieces that are read of question, answer and history; as many as the model can when not given."""
    batch: int = 200
    """Rows of text that go through the model at once."""
    out: str | None = None
    """Folder for ranks.json and scores.json; required with --model."""
    allow_partial: bool = False
    """Score the rounds that have ranks although others have none."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, max_tokens=self.max_tokens, batch=self.batch)
        _one_of(self.model, self.results, "ranks", self.out)


@dataclass(frozen=True)
class Vqa(_Resampled, _Machine):
    """Measure visual question answering by the official accuracy, or answer questions that have no answers yet."""

    source: PictureQuestions
    """Questions with their pictures, and with people's answers where there are any."""
    model: str | None = None
    """Model that answers: a folder, or a name on the hub."""
    results: str | None = None
    """Answers to score instead: JSON list of {"question_id", "answer"}, as EvalAI takes it."""
    candidates: str | None = None
    """File of answers to choose from, a JSON list or one a line; the model's answers.json when not given."""
    method: Literal["auto", "rank", "generate"] = "auto"
    """`rank` chooses among candidates, `generate` searches for words; `auto` ranks where there are candidates."""
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    """How a question is answered"""
    limit: int | None = None
    """Questions to use, from the first on; all when not given."""
    batch: int = 16
    """Pictures that go through the model at once, with all the questions about them."""
    threads: int = 2
    """Threads that decode pictures."""
    out: str | None = None
    """Folder for results.json and scores.json; required with --model."""
    allow_partial: bool = False
    """Score the questions that have a result although others have none."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, batch=self.batch, threads=self.threads)
        super().__post_init__()
        _one_of(self.model, self.results, "answers", self.out)


def _one_of(model: str | None, results: str | None, what: str, out: str | None) -> None:
    if (model is None) == (results is None):
        raise ValueError(f"give either --results FILE, {what} to score, or --model DIR, which makes them")
    if model and out is None:
        raise ValueError(f"--model needs --out DIR, where the {what} are kept")
