"""A live page of a running job, for browsers on this machine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_cpt.report.build_page import build_page
from megatron_cpt.report.html_page import html_page
from megatron_cpt.report.run_record import RunReader

HOST = "127.0.0.1"
_LOCAL_NAMES = (HOST, "localhost")


class LivePage:
    """The newest page of runs, made again only when their files have changed."""

    def __init__(self, readers: Sequence[RunReader]) -> None:
        self._readers, self._lock = readers, threading.Lock()
        self._version, self._page = "", b""

    def version(self) -> str:
        """Return a text that changes when the files of the runs change."""
        return "-".join(reader.state() for reader in self._readers)

    def page(self) -> bytes:
        """Return the page of the newest files."""
        with self._lock:
            version = self.version()
            if version != self._version:
                page = build_page([reader.read() for reader in self._readers])
                self._page, self._version = html_page(page, version=version).encode(), version
            return self._page


class _Handler(BaseHTTPRequestHandler):
    """Answers `/` with the page and `/version` with its version; everything else does not exist."""

    live: LivePage

    def do_HEAD(self) -> None:
        """Answer as GET does, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer a request from this machine."""
        if (self.headers.get("Host") or "").partition(":")[0] not in _LOCAL_NAMES:  # browsers omit port 80
            self.send_error(HTTPStatus.FORBIDDEN)  # a page of the internet whose name points to this machine
        elif self.path == "/":
            self._send(self.live.page(), "text/html; charset=utf-8")
        elif self.path == "/version":
            self._send(self.live.version().encode(), "text/plain; charset=utf-8")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):  # the reader has left
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Print nothing: a live page asks every two seconds."""


def open_server(readers: Sequence[RunReader], port: int) -> ThreadingHTTPServer:
    """Return a server of the live page; the caller runs `serve_forever`.

    Args:
        readers: of the run and the runs that it is compared with.
        port: of 127.0.0.1; 0: any free one.

    Raises:
        OSError: the port is taken.
    """
    handler = type("_LiveHandler", (_Handler,), {"live": LivePage(readers)})
    server = ThreadingHTTPServer((HOST, port), handler)
    server.daemon_threads = True
    return server
