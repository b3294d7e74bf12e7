"""A web server on 127.0.0.1 that answers ranges of a folder's files, with planted faults."""

import gzip
import http.server
import re
import threading
import urllib.parse
from pathlib import Path


class RangeServer:
    """Serve a folder; `faults` maps a file name to the faults of its next requests, "" for a right answer.

    Faults are a status ("500"), "drop" (the connection ends within the answer), "whole" (ranges are ignored), "gzip",
    "short" (fewer bytes than announced), "long" and "redirect ADDRESS". A fault under "*" holds for every request.
    """

    def __init__(self, folder: Path):
        self.folder, self.faults, self.tags, self.requests = Path(folder), {}, {}, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self._httpd.handle_error = lambda *_: None  # of clients that were killed
        self.address = f"http://127.0.0.1:{self._httpd.server_port}"
        threading.Thread(target=self._httpd.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._httpd.shutdown()
        self._httpd.server_close()

    def bytes_sent(self) -> int:
        return sum(size for _, _, size in self.requests)

    def answer(self, handler) -> None:
        name = urllib.parse.unquote(urllib.parse.urlsplit(handler.path).path).lstrip("/")
        waiting = self.faults.get(name) or []
        fault = waiting.pop(0) if waiting else self.faults.get("*", "")
        path = self.folder / name
        if not path.is_file() or not path.resolve().is_relative_to(self.folder.resolve()):
            return self._send(handler, name, 404, b"", {})
        if fault.isdigit():
            return self._send(handler, name, int(fault), b"busy", {})
        if fault.startswith("redirect "):
            return self._send(handler, name, 302, b"", {"Location": fault.split(" ", 1)[1]})
        info = path.stat()
        size, tag = info.st_size, self.tags.get(name, f'"{info.st_size:x}-{info.st_mtime_ns:x}"')
        headers = {"ETag": tag} if tag else {}
        ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if fault == "whole" or not ranged:
            return self._send(handler, name, 200, path.read_bytes(), headers)
        start, stop = int(ranged[1]), min(int(ranged[2]) + 1, size)
        if start >= size:
            return self._send(handler, name, 416, b"no", headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            part = file.read(stop - start)
        if fault == "gzip":
            return self._send(handler, name, 206, gzip.compress(part), headers | {"Content-Encoding": "gzip"})
        if fault == "short":
            return self._send(handler, name, 206, part[:-1], headers)
        if fault == "long":
            return self._send(handler, name, 206, part + b"more", headers)
        return self._send(handler, name, 206, part, headers, drop=fault == "drop")

    def _send(self, handler, name, status, content, headers, drop=False) -> None:
        self.requests.append((name, status, len(content)))
        handler.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if drop else content)
        if drop:
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.close()
