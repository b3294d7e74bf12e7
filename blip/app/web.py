"""What the demo page and the HTTP service share: limits of a request, and whom they admit. Light to import."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from blip.app.commands.shared import MODEL_VARIABLE

MAX_BYTES, MAX_PIXELS = 5 << 20, 20_000_000
"""Limits of an uploaded image."""
MOST_CAPTIONS, MOST_TEXTS, MOST_LETTERS = 10, 20, 2000
"""Limits of one request; letters are characters of one text field."""
WAITING = 64
"""Most requests that may wait for the model; further ones are refused with a message."""
BODY_BYTES = MAX_BYTES + (64 << 10)
"""Most bytes of a request body: an image and its form encoding."""
_DROPPED, _PATIENCE = 16 << 20, 2.0
"""Most bytes, and seconds, of a refused request that are received."""
LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Names by which this machine's own browsers and programs call it."""

Answer = Callable[[dict[str, Any], Any, Any], Awaitable[None]]
"""ASGI application."""


class _TooLargeError(Exception):
    """A request body exceeds the limit; no more of it is read."""


class Guard:
    """ASGI middleware that refuses other host names, other origins and large requests."""

    def __init__(
        self,
        app: Answer,
        hosts: tuple[str, ...] | None,
        headers: dict[str, str],
        refusal: Callable[[int, str], Answer],
        refused_path: Callable[[str], bool] = lambda path: False,
    ) -> None:
        """`hosts` are the allowed names in Host and Origin headers, all if None; this stops DNS rebinding.

        `headers` are added to every response; `refusal(status, message)` makes the response to a refused request.
        """
        self.app, self.hosts, self.refusal, self.refused_path = app, hosts, refusal, refused_path
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        received, started = 0, False

        async def counted() -> dict[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > BODY_BYTES:  # a body without Content-Length, or with a wrong one
                raise _TooLargeError
            return message

        async def with_headers(message: dict[str, Any]) -> None:
            nonlocal started
            if received > BODY_BYTES and not started:
                return  # drop the application's own answer to the error
            started = True
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        if refusal and b"expect" not in dict(scope["headers"]):
            await _drop(receive)
        try:
            await (refusal or self.app)(scope, counted, with_headers)
        except Exception:
            if received <= BODY_BYTES or started:
                raise
        if received > BODY_BYTES and not started:
            received = 0
            await _drop(receive)
            await self._too_large()(scope, receive, with_headers)

    def _refusal(self, scope: dict[str, Any]) -> Answer | None:
        headers = {name: value.decode("latin1") for name, value in scope["headers"]}
        if self.hosts is not None:
            origin = headers.get(b"origin")
            if _name(headers.get(b"host", "")) not in self.hosts or (
                origin is not None and _name(origin.partition("://")[2]) not in self.hosts
            ):
                return self.refusal(403, "only this machine may use this address")
        if self.refused_path(scope["path"].lower()):
            return self.refusal(403, "not allowed")
        size = headers.get(b"content-length", "0")
        return self._too_large() if not size.isdecimal() or len(size) > 18 or int(size) > BODY_BYTES else None

    def _too_large(self) -> Answer:
        return self.refusal(413, f"more than {MAX_BYTES >> 20} MB")


async def _drop(receive: Any) -> None:
    """Drop what arrives of a refused request, for a moment, so that its sender gets to read the answer."""
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            while dropped < _DROPPED:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                dropped += len(message.get("body", b""))


def _name(host: str) -> str:
    """The name in a Host header, without the port and in lower case, as names mean the same in any."""
    return (host[: host.rindex(":")] if ":" in host and not host.endswith("]") else host).lower()


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def admitted(host: str) -> tuple[str, ...] | None:
    """Names that requests to a server listening at `host` may call it by; None for any."""
    return (*LOCAL, host.lower(), f"[{host.strip('[]').lower()}]") if is_local(host) else None


def listening(host: str, port: int) -> socket.socket:
    """Open a socket at an address; port 0 is any that is free. ValueError if it cannot listen there."""
    if port > 65535:  # the system would take the remainder
        raise ValueError(f"port must be 65535 or less, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind)
        try:
            if os.name == "posix":  # elsewhere it would share the port with another program
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(128)
        except BaseException:
            opened.close()
            raise
        return opened
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen at {host} port {port} ({reason}): give another --port or --host") from None


def model_name(where: str | None) -> str:
    """Name of a model for those who use it: that on the hub, or the last two parts of a folder's path.

    The rest of a path, which may name a user of this machine, is not for others.
    """
    where = where or os.environ.get(MODEL_VARIABLE, "")
    if not os.path.exists(where):
        return where
    return "/".join(part for part in os.path.abspath(where).split(os.sep)[-2:] if part)
