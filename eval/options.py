"""The options of `blip-eval`, a class for each task with an example, and the table of tasks.

They stand here and not beside their tasks because those import torch, for which `--help` and a typing error need not
wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip.data.settings import Dialogues, ImageQuestions, ImageSentences, SourceConfig
from blip.inference.settings import CAPTION_PROMPT, DECODE_PRESETS, AnswerConfig, DecodeConfig


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """Device and precision."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` is a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numeric precision. `auto` is float32, where results do not depend on batch size."""


@dataclass(frozen=True, kw_only=True)
class _Resampled:
    """Confidence intervals of the scores."""

    resamples: int = 1000
    """Bootstrap draws for the 95% intervals; 0 for none."""
    seed: int = 0
    """Random seed of the bootstrap intervals."""

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise ValueError("resamples must be 0 or more")


@dataclass(frozen=True)
class CaptioningOptions(_Resampled, _Machine):
    """Score captions that are there (--results), or generate them with a model (--model) and score those.

    Examples:

        blip-eval captioning --references captions.json --results results.json --out runs/scores
        blip-eval captioning --model runs/caption/model --out runs/scores \\
            --source.path coco/dataset_coco.json --source.image_root coco --source.split test
    """

    results: str | None = None
    """Captions to score: a JSON list of {"image_id", "caption"}, as COCO's server takes it."""
    references: str | None = None
    """File of reference captions: COCO's annotations, {id: [captions]}, or a list of {image, image_id, caption};
    those of the source when not given."""
    model: str | None = None
    """Model that generates captions: a folder, or a name on the hub."""
    source: SourceConfig | None = None
    """Images, with their captions if there are any: `--source.path FILE --source.image_root FOLDER`."""
    preset: Literal["caption_2022", "greedy", "nucleus", "capfilt_2022"] = "caption_2022"
    """Ways of generating, which `--decode.` options change."""
    decode: DecodeConfig = field(default_factory=lambda: DECODE_PRESETS["caption_2022"])
    """How captions are generated"""
    prompt: str = CAPTION_PROMPT
    """What captions go on from; "" for a model that was trained without."""
    limit: int | None = None
    """Images of the source to use, from the first on; all when not given."""
    batch: int = 32
    """Images that are captioned at once."""
    threads: int = 2
    """Threads that decode images."""
    out: str | None = None
    """Folder for results.json, scores.json and captions.html; required with --model."""
    tokenizer: Literal["auto", "java", "python"] = "auto"
    """Tokenizer of captions: Stanford's (needs Java), the rules here, or Java if it answers."""
    meteor: bool = True
    """Compute METEOR if there is Java; it starts in some 15 seconds."""
    spice: bool = True
    """Compute SPICE if there is Java and its parser."""
    spice_folder: str | None = None
    """Folder of spice-1.0.jar with lib/; pycocoevalcap's when not given."""
    java_timeout: float = 300.0
    """Time limit of a Java program, seconds."""
    allow_partial: bool = False
    """Score the images that have a result although others of the references have none."""
    shown: int = 60
    """Images on the page, half of them the best by CIDEr, half the worst."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, batch=self.batch, threads=self.threads, java_timeout=self.java_timeout)
        super().__post_init__()
        if self.shown < 0:
            raise ValueError("shown must be 0 or more")
        if (self.results is None) == (self.model is None):
            raise ValueError("give either --results FILE, captions to score, or --model DIR, which generates them")
        if self.model and self.source is None:
            raise ValueError("--model needs images: --source.path FILE")
        if self.model and self.out is None:
            raise ValueError("--model needs --out DIR, where the captions are kept")
        if self.results and self.references is None and self.source is None:
            raise ValueError("--results needs --references FILE (or --source.path FILE), human captions")


@dataclass(frozen=True)
class RetrievalOptions(_Machine):
    """Measure image-text retrieval: recall at 1, 5 and 10 both ways, by ITC and re-ranked by ITM.

    Examples:

        blip-eval retrieval --model runs/base/model \\
            --source.path coco/dataset_coco.json --source.image_root coco --source.split test
    """

    model: str
    """Model: a folder, or a name on the hub."""
    source: SourceConfig
    """Images with their captions."""
    limit: int | None = None
    """Images to use, from the first on; all when not given."""
    k: int = 128
    """Candidates that are re-ranked."""
    max_tokens: int = 35
    """Word pieces kept of a caption."""
    batch: int = 50
    """Images that are read at once."""
    out: str | None = None
    """Folder for scores.json and results.json, the ranking of each image and text."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, k=self.k, max_tokens=self.max_tokens, batch=self.batch)


@dataclass(frozen=True)
class VideoRetrievalOptions(_Machine):
    """Measure text-video retrieval by a model of images: recall at 1, 5 and 10, by ITC and re-ranked by ITM.

    Examples:

        blip-eval video_retrieval --model runs/retrieval/model --clips msrvtt_test.jsonl --video_root MSRVTT/videos
    """

    model: str
    """Model: a folder, or a name on the hub."""
    clips: str
    """List of clips with captions: MSR-VTT's {videos, sentences}, or rows of {video, caption} as JSON, lines or CSV."""
    video_root: str | None = None
    """Folder of the videos; the list's own folder when not given."""
    split: str | None = None
    """Split to take where the list has several."""
    limit: int | None = None
    """Clips to use, from the first on; all when not given."""
    frames: int = 8
    """Frames to use of each clip, evenly spaced."""
    k: int = 128
    """Candidates that are re-ranked."""
    max_tokens: int = 35
    """Word pieces kept of a caption."""
    batch: int = 4
    """Clips that go through the image encoder at once."""
    out: str | None = None
    """Folder for scores.json and results.json, the ranking of each clip and text."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, frames=self.frames, k=self.k, max_tokens=self.max_tokens, batch=self.batch)


@dataclass(frozen=True)
class VideoQuestionsOptions(_Machine):
    """Measure question answering about videos by a model of images and questions: the share of right answers.

    Examples:

        blip-eval video_questions --model runs/vqa/model --questions msrvtt_test_qa.json --video_root MSRVTT/videos
    """

    model: str
    """Model: a folder, or a name on the hub."""
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
    """Frames to use of each clip, evenly spaced."""
    batch: int = 4
    """Clips that go through the image encoder at once."""
    out: str | None = None
    """Folder for scores.json and results.json, the answers."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, frames=self.frames, batch=self.batch)


@dataclass(frozen=True)
class ClassificationOptions(_Machine):
    """Measure zero-shot classification of images that are sorted into a folder for each class.

    Examples:

        blip-eval classification --model runs/retrieval/model --source imagenet/val --names imagenet_names.json
    """

    model: str
    """Model: a folder, or a name on the hub."""
    source: str
    """Folder of the classes' folders, SOURCE/CLASS/image.jpg."""
    names: str | None = None
    """JSON file of {"folder": "name of the class"}; the folders' names when not given, with spaces for underscores."""
    templates: str | None = None
    """File of prompt templates, one a line, {} where the name of the class goes; seven of ours when not given."""
    batch: int = 32
    """Images that go through the model at once."""
    out: str | None = None
    """Folder for scores.json and results.json, the likeliest classes of each image."""

    def __post_init__(self) -> None:
        _positive(batch=self.batch)


@dataclass(frozen=True)
class NlvrOptions(_Resampled, _Machine):
    """Measure how often a model tells whether a sentence is true of several images: NLVR2, NLVR's three boxes.

    Examples:

        blip-eval nlvr2 --model runs/nlvr2/model --source.path nlvr2/dev.json --out runs/scores
        blip-eval nlvr2 --results results.csv --source.path nlvr2/dev.json
        blip-eval nlvr --model runs/nlvr_boxes/model --source.path nlvr/dev/dev.json --source.part val --out runs/scores
    """

    source: ImageSentences
    """Sentences with their images and labels."""
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
class VisdialOptions(_Machine):
    """Measure where the right answers of visual dialogues are ranked: MRR, recall, mean rank, NDCG.

    Examples:

        blip-eval visdial --model runs/visdial/model --out runs/scores \\
            --source.path visdial_1.0_val.json --source.relevance visdial_1.0_val_dense_annotations.json
    """

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
class VqaOptions(_Resampled, _Machine):
    """Measure visual question answering by the official accuracy, or answer questions that have no answers yet.

    Examples:

        blip-eval vqa --model runs/vqa/model --out runs/scores --source.image_root coco \\
            --source.path v2_OpenEnded_mscoco_val2014_questions.json \\
            --source.annotations v2_mscoco_val2014_annotations.json
    """

    source: ImageQuestions
    """Questions with their images, and human answers where there are any."""
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
    """Images that go through the model at once, with all the questions about them."""
    threads: int = 2
    """Threads that decode images."""
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


COMMANDS: dict[str, tuple[type, str]] = {
    "captioning": (CaptioningOptions, "eval.captioning"),
    "retrieval": (RetrievalOptions, "eval.retrieval"),
    "nlvr2": (NlvrOptions, "eval.nlvr"),
    "nlvr": (NlvrOptions, "eval.nlvr"),
    "visdial": (VisdialOptions, "eval.dialogue"),
    "vqa": (VqaOptions, "eval.vqa"),
    "video_retrieval": (VideoRetrievalOptions, "eval.video_retrieval"),
    "video_questions": (VideoQuestionsOptions, "eval.video_questions"),
    "classification": (ClassificationOptions, "eval.classification"),
}
"""The options of a task, and the module whose `evaluate` takes them."""
