"""A page for the browser of this machine alone: its address has a secret, and other hosts and origins are refused."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

LARGEST = 64 * 1024
"""Most bytes of a request's body."""
Handler = Callable[[Mapping[str, Any]], str | bytes | dict]
"""Query or JSON body of a request -> a page, a JPEG image, or an object sent as JSON."""


class PageServer(ThreadingHTTPServer):
    """Serves `routes`, such as "GET /" and "POST /label", below `address`.

    Requests are answered one at a time. ValueError of a handler is answered with status 400, LookupError with 404, any
    other with 500; the answer is {"error": message}.
    """

    daemon_threads = True

    def __init__(self, routes: Mapping[str, Handler], port: int = 0) -> None:
        """Listen on `port`, by default any that is free. ValueError if the port is taken."""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"port {port} of 127.0.0.1 cannot be used ({error}): give another --port") from None
        self.routes, self.secret, self.answering = dict(routes), secrets.token_urlsafe(16), threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def until_interrupted(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 30
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "openblip", ""

    def do_GET(self) -> None:
        self._answer(dict(parse_qsl(urlsplit(self.path).query)))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            return self._refuse(411, "a request needs its length")
        if len(length) > 9 or int(length) > LARGEST:
            return self._refuse(413, f"a request has at most {LARGEST:,} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return self._refuse(400, "the request is not JSON")
        if not isinstance(body, dict):
            return self._refuse(400, "the request is not a JSON object")
        self._answer(body)

    def _answer(self, given: Mapping[str, Any]) -> None:
        hosts = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin", "" if self.command == "GET" else "none")
        if self.headers.get("Host") not in hosts or (origin and origin.removeprefix("http://") not in hosts):
            return self._refuse(403, "only pages of this server may ask it")
        _, secret, *rest = (urlsplit(self.path).path + "/").split("/", 2)
        route = self.server.routes.get(f"{self.command} /{rest[0].rstrip('/') if rest else ''}")
        if not hmac.compare_digest(secret.encode(), self.server.secret.encode()) or route is None:
            return self._refuse(404, "there is no such page")
        try:
            with self.server.answering:
                answer = route(given)
        except ValueError as error:
            return self._refuse(400, str(error))
        except LookupError as error:
            return self._refuse(404, str(error.args[0] if error.args else error))
        except (
            Exception
        ) as error:  # a full disk, or a fault of ours: the page says it, and the next request is answered
            return self._refuse(500, f"{type(error).__name__}: {error}")
        if isinstance(answer, dict):
            return self._send(200, json.dumps(answer).encode(), "application/json")
        if isinstance(answer, bytes):
            return self._send(200, answer, "image/jpeg")
        return self._send(200, answer.encode("utf-8", "replace"), "text/html; charset=utf-8")

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # the body may not have been read
        self._send(status, json.dumps({"error": message}).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Connection": "close" if self.close_connection else "keep-alive",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: addresses have the secret."""
