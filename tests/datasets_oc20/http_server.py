"""An HTTP server on loopback that misbehaves as told."""

import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class Server:
    """Serves `content` at every address.

    Each request takes the next of `script`, and is served well when none is left: a status (`503`), `"cut:N"`
    (N bytes, then the connection closes), `"no ranges"`, `"wrong range"`, `"no size"`, `"html"`, or a
    function of the handler. `requests` are the Range headers (None without), `etag` names the version.
    """

    def __init__(self, content: bytes, script: list[Any] | None = None, etag: str | None = '"v1"') -> None:
        self.content, self.script, self.etag = content, list(script or []), etag
        self.requests: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.content)))
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/file.tar"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.requests.append(asked)
        step: int | str | Callable[..., None] = self.script.pop(0) if self.script else "well"
        if callable(step):
            step(request)
            return
        if isinstance(step, int):
            request.send_response(step)
            if step == 503:
                request.send_header("Retry-After", "7")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0  # type: ignore[index]
        same = request.headers.get("If-Range") in (None, self.etag)
        if step == "no ranges" or not same:
            start = 0
        if start and start >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        first = max(start - 3, 0) if step == "wrong range" else start
        body = self.content[first:]
        request.send_response(206 if start else 200)
        if start:
            end = len(self.content)
            request.send_header("Content-Range", f"bytes {first}-{end - 1}/{end}")
        if self.etag:
            request.send_header("ETag", self.etag)
        if step == "html":
            request.send_header("Content-Type", "text/html; charset=utf-8")
        if step != "no size":
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        cut = re.fullmatch(r"cut:(\d+)", step)
        request.wfile.write(body[: int(cut[1])] if cut else body)
        request.close_connection = True
