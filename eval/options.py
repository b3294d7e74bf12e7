"""The options of `python -m eval`. Light to import, as all is that `--help` needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip.config import CAPTION_PROMPT, DECODE_PRESETS, DecodeConfig, SourceConfig


def _positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value}")


@dataclass(frozen=True)
class Captioning:
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
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` is a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products; `auto` is float32, with which captions do not depend on the batch."""
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
    resamples: int = 1000
    """Bootstrap draws for the 95% intervals; 0 for none."""
    seed: int = 0
    """Of those draws."""
    allow_partial: bool = False
    """Score the images that have a result although others of the references have none."""
    shown: int = 60
    """Pictures on the page, half of them the best by CIDEr, half the worst."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, batch=self.batch, threads=self.threads, java_timeout=self.java_timeout)
        if self.resamples < 0 or self.shown < 0:
            raise ValueError("resamples and shown must be 0 or more")
        if (self.results is None) == (self.model is None):
            raise ValueError("give either --results FILE, captions to score, or --model DIR, which writes them")
        if self.model and self.source is None:
            raise ValueError("--model needs pictures: --source.path FILE")
        if self.model and self.out is None:
            raise ValueError("--model needs --out DIR, where the captions are kept")
        if self.results and self.references is None and self.source is None:
            raise ValueError("--results needs --references FILE (or --source.path FILE), what people wrote")


@dataclass(frozen=True)
class Retrieval:
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
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` is a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products; `auto` is float32."""
    out: str | None = None
    """Folder for scores.json."""

    def __post_init__(self) -> None:
        _positive(limit=self.limit, k=self.k, max_tokens=self.max_tokens, batch=self.batch)
