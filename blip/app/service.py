"""The HTTP service of `blip serve`: routes, their fields, and the models behind them.

Requests of all clients share batches in one thread. Images are decoded beside it, within the limits of `blip.app.web`,
and nothing is fetched or written.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import math
import os
import reprlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from blip.app.answers import shown
from blip.app.batching import Batches, BusyError
from blip.app.commands.caption import CaptionOptions
from blip.app.exit import one_line
from blip.app.loaded import Loaded
from blip.app.unknown import question_notes, text_notes
from blip.app.web import (
    BODY_BYTES,
    MAX_BYTES,
    MAX_PIXELS,
    MOST_CAPTIONS,
    MOST_LETTERS,
    MOST_TEXTS,
    WAITING,
    Guard,
)
from blip.data.images import NAMES, model_input
from blip.errors import UnreadableImage, is_out_of_memory
from blip.inference import features
from blip.inference.generate import generate_texts
from blip.inference.settings import CAPTION_PROMPT
from blip.options import version
from blip.text import clean_question

_DECODERS = min(4, os.cpu_count() or 1)
"""Images that are decoded at once, each within the memory of one."""
_BODY_SECONDS = 30
"""Most seconds in which a request's body must arrive."""
_STOP_SECONDS = 30
"""Most seconds for which requests in work are finished when the service is stopped."""
_RETRY = {"retry-after": "1"}
_TOO_LARGE = ("too_many_pixels", "too_many_bytes", "too_much_memory", "too_much_work")
"""Codes of UnreadableImage for an image beyond a limit."""
_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}

_IMAGE = f"An image file ({NAMES}), up to {MAX_BYTES >> 20} MB and {MAX_PIXELS // 1_000_000} million pixels."


# What is sent ---------------------------------------------------------------------------------------------------------


class Fields(BaseModel):
    """Fields of a request beside its image."""

    model_config = ConfigDict(extra="forbid")


class CaptionFields(Fields):
    """Fields of a request for captions, which are those of `blip caption` with the same options."""

    num: int = Field(1, ge=1, le=MOST_CAPTIONS, description="Number of captions, the likeliest first.")
    prompt: str = Field(
        CAPTION_PROMPT, max_length=MOST_LETTERS, description='Prompt that captions continue; "" for none.'
    )
    seed: int = Field(0, ge=-(1 << 53), le=1 << 53, description="Random seed of sampling.")
    method: Literal["beam", "nucleus"] = Field("beam", description="Beam search, or nucleus sampling.")


class AnswerFields(Fields):
    """Fields of a request for answers."""

    question: str = Field(max_length=MOST_LETTERS, description="Question about the image.")
    top: int = Field(1, ge=1, le=MOST_CAPTIONS, description="Most answers to give, best first.")


class MatchFields(Fields):
    """Fields of a request for scores."""

    texts: list[str] = Field(min_length=1, max_length=MOST_TEXTS, description="Texts to compare with the image.")


class EmbedFields(Fields):
    """Fields of a request for embeddings: of one image, or of texts."""

    texts: list[str] | None = Field(None, min_length=1, max_length=MOST_TEXTS, description="Texts to embed.")


# What is answered -----------------------------------------------------------------------------------------------------


class CaptionReply(BaseModel):
    """A generated caption."""

    text: str
    logprob: float
    finished: bool


class CaptionsReply(BaseModel):
    """Captions of an image."""

    captions: list[CaptionReply]
    model: str


class AnswerReply(BaseModel):
    """An answer, and the probability of exactly these words."""

    text: str
    probability: float


class NotedReply(BaseModel):
    """What is answered about texts."""

    notes: list[str] = Field(default=[], description="Texts with words that the model does not know; absent if none.")


class AnswersReply(NotedReply):
    """Answers to a question."""

    answers: list[AnswerReply]
    model: str


class MatchReply(NotedReply):
    """Cosine (ITC) and probability of a match (ITM) of each text."""

    itc: list[float]
    itm: list[float]
    model: str


class EmbedReply(NotedReply):
    """Embeddings of length 1, of the image or of each text."""

    embeddings: list[list[float]]
    model: str


class HealthReply(BaseModel):
    """State of the service."""

    status: Literal["ok", "loading"]
    revision: str | None = None
    waiting: int


class Problem(BaseModel):
    """What was wrong with a request."""

    code: str
    message: str


class ErrorReply(BaseModel):
    """A refusal."""

    error: Problem


class RequestError(Exception):
    """A request that is refused: HTTP status, code, and one line for its sender."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def _refusal(status: int, message: str) -> JSONResponse:
    """Response to a request whose body is not read."""
    code = "too_large" if status == 413 else "forbidden"
    return _error(RequestError(status, code, message), {"connection": "close"})


def _error(error: RequestError, headers: dict[str, str] | None = None) -> JSONResponse:
    headers = {**(headers or {}), **(_RETRY if error.status == 503 else {})}
    return JSONResponse({"error": {"code": error.code, "message": error.message}}, error.status, headers)


# Models ---------------------------------------------------------------------------------------------------------------


class Served(NamedTuple):
    """A model, and its name for clients."""

    loaded: Loaded
    name: str


class Models:
    """What each route needs of the models, on batches of requests."""

    def __init__(self, main: Served, vqa: Served | None = None) -> None:
        """Questions go to `vqa` if it is given, everything else to `main`. ValueError if a model fits no route."""
        self.main, self.vqa = main, vqa or main
        if vqa and "answer" not in vqa.loaded.can:
            raise ValueError(f"--vqa {vqa.name} is {vqa.loaded!r}: give a model trained by recipes.vqa")
        self.verbs = tuple(verb for verb in _WORK if self.has(verb))
        if not self.verbs:
            raise ValueError(f"--model {main.name} is {main.loaded!r}, which this service cannot serve")
        if "answer" in self.verbs:
            self.vqa.loaded.candidates()  # so that a list of answers that does not fit is refused now
        self.revision = main.loaded.options(main.name)["weights"]

    def of(self, verb: str) -> Served:
        return self.vqa if verb == "answer" else self.main

    def has(self, verb: str) -> bool:
        return _NEEDED[verb] in self.of(verb).loaded.can

    def work(self, kind: tuple[Any, ...], items: Sequence[Any]) -> Sequence[Any]:
        """Answer requests of one kind: a verb and what they have in common."""
        verb, *common = kind
        loaded = self.of(verb).loaded
        with loaded.computing(), torch.no_grad():
            return _WORK[verb](loaded, items, *common)


def _caption(loaded: Loaded, items: Sequence[Any], config: Any) -> list[list[dict[str, Any]]]:
    pixels, keys, prompts = zip(*items, strict=True)
    images = torch.stack(pixels).to(loaded.device)
    texts = generate_texts(loaded.model, loaded.tokenizer, images, config, prompt=prompts, keys=keys)
    return [[text._asdict() for text in several] for several in texts]


def _answer(loaded: Loaded, items: Sequence[Any], top: int) -> list[list[dict[str, Any]]]:
    pixels, questions = zip(*items, strict=True)
    answered = loaded.answer(torch.stack(pixels), list(questions), top=top, details=True)
    return [[{"text": answer.text, "probability": answer.probability} for answer in best] for best in answered]


def _match(loaded: Loaded, items: Sequence[Any]) -> list[dict[str, list[float]]]:
    pixels, texts = zip(*items, strict=True)
    tokens = torch.cat([*loaded.tokens(torch.stack(pixels))])
    scores = [
        features.match_texts(loaded.model, loaded.tokenizer, [tokens[i : i + 1]], several, batch=8 * loaded.batch)
        for i, several in enumerate(texts)
    ]
    return [{"itc": one.itc[0].tolist(), "itm": one.probability[0].tolist()} for one in scores]


def _embed(loaded: Loaded, items: Sequence[Any], is_text: bool) -> list[list[list[float]]]:
    if not is_text:
        return [[row] for row in loaded.embed_image(torch.stack(list(items))).tolist()]
    rows = iter(loaded.embed_text([text for texts in items for text in texts]).tolist())
    return [[next(rows) for _ in texts] for texts in items]


_NEEDED = {"caption": "caption", "answer": "answer", "match": "match", "embed": "embed_image"}
"""Route -> the method of `Loaded` that it is made of."""
_WORK: dict[str, Callable[..., Sequence[Any]]] = {
    "caption": _caption, "answer": _answer, "match": _match, "embed": _embed,
}  # fmt: skip
"""Route -> its function of a model, the items of some requests, and what they have in common."""


# Requests -------------------------------------------------------------------------------------------------------------


class _Form(MultiPartParser):
    """Form whose files stay in memory; `Guard` limits their size."""

    spool_max_size = max_file_size = BODY_BYTES + 1


@dataclass(frozen=True)
class _Sent:
    """A request's image and fields as they came."""

    image: bytes | None
    values: dict[str, Any]
    is_text: bool
    """Whether numbers came as text, as in a form."""


async def _read(request: Request) -> _Sent:
    """Read a request's body. RequestError for one of another form, or an image that is none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            if kind == "application/json":
                return _of_json(await request.body())
            if kind == "multipart/form-data":
                return await _of_form(request)
    except TimeoutError:
        raise RequestError(408, "too_slow", f"the request took more than {_BODY_SECONDS} seconds to arrive") from None
    raise RequestError(415, "unknown_form", "send multipart/form-data or application/json")


def _of_json(body: bytes) -> _Sent:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "invalid_request", "the body is not JSON") from None
    if not isinstance(values, dict):
        raise RequestError(400, "invalid_request", "the body is not a JSON object")
    values = {name: value for name, value in values.items() if value is not None}
    image = values.pop("image", None)
    if image is None:
        return _Sent(None, values, False)
    if isinstance(image, str) and "://" in image[:16]:
        raise RequestError(400, "invalid_request", "image: nothing is fetched from addresses; send the file's base64")
    try:
        return _Sent(base64.b64decode("".join(image.split()), validate=True), values, False)
    except (AttributeError, ValueError, binascii.Error):
        raise RequestError(400, "invalid_request", "image: expected the file's bytes as base64") from None


async def _of_form(request: Request) -> _Sent:
    parser = _Form(request.headers, request.stream(), max_files=1, max_fields=MOST_TEXTS + 8, max_part_size=BODY_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(400, "invalid_request", f"the form cannot be read: {error.message}") from None
    values: dict[str, Any] = {}
    image = None
    for name, value in form.multi_items():
        if name == "image":
            if not isinstance(value, UploadFile):
                raise RequestError(400, "invalid_request", "image: expected a file, as curl -F image=@photo.jpg")
            image = await value.read()
            await value.close()
        elif isinstance(value, UploadFile):
            raise RequestError(400, "invalid_request", f"{name!r}: expected text, got a file")
        elif name == "texts":
            values.setdefault(name, []).append(value)
        elif name in values:
            raise RequestError(400, "invalid_request", f"{name!r} is given twice")
        else:
            values[name] = value
    return _Sent(image, values, True)


def _checked(sent: _Sent, fields: type[Fields]) -> Any:
    """The fields, in their types. RequestError names one that is wrong."""
    try:
        return fields.model_validate(sent.values, strict=not sent.is_text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:60]
    if first["type"] == "extra_forbidden":
        message = f"there is no field {place!r}; give {', '.join(['image', *fields.model_fields])}"
    elif first["type"] == "missing":
        message = f"{place} is missing"
    else:
        message = f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}, got {reprlib.repr(first['input'])}"
    raise RequestError(400, "invalid_request", message)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Turn errors into RequestError; only a ValueError says more to the sender than that there is one."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not is_out_of_memory(error.__context__ or error):
            raise RequestError(400, "invalid_request", one_line(error)) from None
        traceback.print_exc()
        raise RequestError(500, "internal", "something went wrong; the service's log says what") from None


class Service:
    """The application, and the models behind it once they are loaded."""

    def __init__(self, *, batch: int, wait: float, hosts: tuple[str, ...] | None = None) -> None:
        """`wait` is in seconds; `hosts` as in `Guard`."""
        self.models: Models | None = None
        self.batches = Batches(self._work, batch=batch, wait=wait, most_waiting=WAITING)
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        self.api = self._api()
        self.app = _logged(Guard(self.api, hosts, _HEADERS, _refusal))

    def _work(self, kind: tuple[Any, ...], items: Sequence[Any]) -> Sequence[Any]:
        return self.models.work(kind, items)

    # Routes -----------------------------------------------------------------------------------------------------------

    def _api(self) -> FastAPI:
        api = FastAPI(
            title="openblip", version=version(), docs_url=None, redoc_url=None, redirect_slashes=False,
            description="Captions, answers, match scores and embeddings of images. Nothing is fetched from addresses.",
        )  # fmt: skip
        api.add_exception_handler(HTTPException, _no_route)
        api.add_api_route(
            "/health", self.health, methods=["GET"], response_model=None, summary="Whether the model is loaded.",
            responses={200: {"model": HealthReply}, 503: {"model": HealthReply}},
        )  # fmt: skip
        for verb, answer, fields, reply, needs_image in (
            ("caption", self.caption, CaptionFields, CaptionsReply, True),
            ("answer", self.answer, AnswerFields, AnswersReply, True),
            ("match", self.match, MatchFields, MatchReply, True),
            ("embed", self.embed, EmbedFields, EmbedReply, False),
        ):
            api.add_api_route(
                f"/v1/{verb}", self._route(verb, fields, answer, needs_image), methods=["POST"], response_model=None,
                operation_id=verb, summary=(reply.__doc__ or "").strip(),
                responses={200: {"model": reply}} | {code: {"model": ErrorReply} for code in _STATUSES},
                openapi_extra={"requestBody": {"required": True, "content": _content(fields, needs_image)}},
            )  # fmt: skip
        return api

    def _route(self, verb: str, fields: type[Fields], answer: Callable[..., Any], needs_image: bool) -> Callable:
        async def route(request: Request) -> JSONResponse:
            try:
                return JSONResponse(await self._reply(request, verb, fields, answer, needs_image))
            except RequestError as error:
                return _error(error)
            except ClientDisconnect:
                return _error(RequestError(400, "invalid_request", "the request broke off"))

        return route

    async def _reply(
        self, request: Request, verb: str, fields: type[Fields], answer: Callable[..., Any], needs_image: bool
    ) -> dict[str, Any]:
        if self.models is None:
            raise RequestError(503, "loading", "the model is being loaded; try again")
        one = self.models.of(verb)
        if not self.models.has(verb):
            remedy = "; start the service with --vqa DIR, a model trained by recipes.vqa" if verb == "answer" else ""
            served = ", ".join(f"/v1/{other}" for other in self.models.verbs)
            raise RequestError(422, "not_supported", f"the model {one.name} has no /v1/{verb}, only {served}{remedy}")
        try:
            ticket = self.batches.enter()
        except BusyError:
            raise RequestError(503, "busy", f"{WAITING} requests wait already; try again") from None
        try:
            sent = await _read(request)
            values = _checked(sent, fields)
            if needs_image and not sent.image:
                raise RequestError(400, "invalid_request", "image is missing or empty")
            with _own_errors():
                kind, item, reply = await answer(one.loaded, values, sent.image)
                result = await asyncio.wrap_future(self.batches.submit(ticket, (verb, *kind), item))
            return _finite({**reply(result), "model": one.name})
        finally:
            self.batches.leave(ticket)

    async def _pixels(self, loaded: Loaded, image: bytes) -> torch.Tensor:
        """Decode an image in another thread. RequestError if it cannot be used."""
        if len(image) > MAX_BYTES:
            raise RequestError(413, "too_many_bytes", f"the image has {len(image):,} bytes; the limit is {MAX_BYTES:,}")
        work = asyncio.get_running_loop().run_in_executor
        try:
            return await work(self._decoders, model_input, image, MAX_PIXELS, loaded.transform)
        except UnreadableImage as error:
            status = 413 if error.code in _TOO_LARGE else 415
            raise RequestError(status, error.code, f"the image cannot be used: {error.reason}") from None

    async def caption(self, loaded: Loaded, values: CaptionFields, image: bytes) -> tuple[Any, Any, Callable]:
        if loaded.tokenizer.unknown_rate([values.prompt]):
            raise ValueError(f"prompt: {values.prompt!r} has words that the model does not know; give an empty one")
        config = CaptionOptions(images=[], method=values.method, num=values.num, seed=values.seed).decoding()
        pixels = await self._pixels(loaded, image)
        item = (pixels, hashlib.sha256(image).hexdigest(), values.prompt)
        return (config,), item, lambda captions: {"captions": captions}

    async def answer(self, loaded: Loaded, values: AnswerFields, image: bytes) -> tuple[Any, Any, Callable]:
        if not clean_question(values.question):
            raise ValueError("question: it has no words")
        notes = question_notes(loaded.tokenizer, values.question)
        item = (await self._pixels(loaded, image), values.question)
        return (values.top,), item, lambda answers: {"answers": answers, **_noted(notes)}

    async def match(self, loaded: Loaded, values: MatchFields, image: bytes) -> tuple[Any, Any, Callable]:
        notes = _notes(loaded, values.texts)
        return (), (await self._pixels(loaded, image), values.texts), lambda scores: {**scores, **_noted(notes)}

    async def embed(self, loaded: Loaded, values: EmbedFields, image: bytes | None) -> tuple[Any, Any, Callable]:
        if (image is None) == (values.texts is None):
            raise ValueError("give either image or texts")
        notes = _notes(loaded, values.texts) if image is None else []
        item = values.texts if image is None else await self._pixels(loaded, image)
        return (image is None,), item, lambda rows: {"embeddings": rows, **_noted(notes)}

    async def health(self) -> JSONResponse:
        """State of the service: 503 until the model is loaded."""
        if self.models is None:
            return JSONResponse({"status": "loading", "waiting": 0}, 503, _RETRY)
        state = {"status": "ok", "revision": self.models.revision, "waiting": self.batches.waiting}
        return JSONResponse(state)


_STATUSES = (400, 403, 408, 413, 415, 422, 500, 503)
"""Statuses of refused requests."""


def _noted(notes: list[str]) -> dict[str, list[str]]:
    return {"notes": notes} if notes else {}


def _notes(loaded: Loaded, texts: Sequence[str]) -> list[str]:
    """Texts with unknown words. ValueError for a text that is too long, or of which no word is known."""
    for number, text in enumerate(texts, 1):
        if len(text) > MOST_LETTERS:
            raise ValueError(f"texts: text {number} has {len(text):,} characters; the limit is {MOST_LETTERS:,}")
    return text_notes(loaded.tokenizer, texts)


def _finite(reply: dict[str, Any]) -> dict[str, Any]:
    """The reply. RequestError if it has numbers that JSON does not have."""

    def is_finite(value: Any) -> bool:
        if isinstance(value, dict | list):
            return all(map(is_finite, value.values() if isinstance(value, dict) else value))
        return not isinstance(value, float) or math.isfinite(value)

    if not is_finite(reply):
        raise RequestError(500, "not_finite", "the model's result is not a finite number")
    return reply


async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    del request
    code = {404: "no_such_route", 405: "wrong_method"}.get(error.status_code, "refused")
    return _error(RequestError(error.status_code, code, f"{error.detail}; /openapi.json lists the routes"))


def _content(fields: type[Fields], needs_image: bool) -> dict[str, Any]:
    """OpenAPI's description of the two forms of a request."""
    schema = fields.model_json_schema()
    required = [*(["image"] if needs_image else []), *schema.get("required", ())]

    def with_image(**form: str) -> dict[str, Any]:
        image = {"image": {"type": "string", "description": _IMAGE, **form}}
        return {"schema": {**schema, "properties": image | schema["properties"], "required": required}}

    return {
        "multipart/form-data": with_image(format="binary"),
        "application/json": with_image(contentEncoding="base64"),
    }


def _logged(app: Any) -> Any:
    """ASGI middleware that prints a line for each request, without anything that it asks."""

    async def logged(scope: dict[str, Any], receive: Any, send: Any) -> None:
        began, status = time.monotonic(), 0

        async def noting(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, noting)
        finally:
            client = (scope.get("client") or ("-",))[0]
            line = f"{client} {scope.get('method')} {shown(scope['path'][:100])} {status}"
            print(f"{line} {1000 * (time.monotonic() - began):.0f} ms", file=sys.stderr, flush=True)

    return logged


# The server -----------------------------------------------------------------------------------------------------------


def serve(service: Service, opened: Any, load: Callable[[], Models]) -> None:
    """Serve on a listening socket until SIGTERM, then finish what is in work; KeyboardInterrupt after Ctrl-C.

    Models are loaded while the service already listens. Raises the error of `load`.
    """
    config = uvicorn.Config(
        service.app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False, proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=_STOP_SECONDS,
    )  # fmt: skip
    server, failed = uvicorn.Server(config), []

    def compute() -> None:
        try:
            service.models = load()
        except Exception as error:
            failed.append(error)
            server.should_exit = True
            return
        print(f"ready: {', '.join(service.models.verbs)}", file=sys.stderr, flush=True)
        service.batches.run()

    threading.Thread(target=compute, name="model", daemon=True).start()
    server.run(sockets=[opened])
    if failed:
        raise failed[0]
