"""A page in headless Chromium: its document after its scripts have run, and the hosts that it has asked."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-extensions"),
)
_OWN_HOSTS = ("google.com", "googleapis.com", "gvt1.com", "gstatic.com")  # Chromium's own services


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Visit:
    """Outcome of a visit: the document, the hosts it has asked for, and the messages of the console."""

    document: str
    hosts: Sequence[str]
    console: str


def visit(page: Path, profile: Path, *, width: int = 1280, height: int = 2000) -> Visit:
    """Open a file in Chromium, behind a proxy that records every request and answers none."""
    chromium = find_chromium()
    assert chromium is not None
    with _recording_proxy() as (port, hosts):
        options = [f"--user-data-dir={profile}", f"--proxy-server=127.0.0.1:{port}", f"--window-size={width},{height}"]
        options += ["--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=10000", "--dump-dom"]
        done = subprocess.run(
            [chromium, *_QUIET, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=300
        )
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    asked = [host for host in hosts if not host.partition(":")[0].endswith(_OWN_HOSTS)]
    return Visit(done.stdout, asked, console)


@contextmanager
def _recording_proxy() -> Iterator[tuple[int, list[str]]]:
    hosts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hosts.append(self.headers.get("Host") or self.path)
            self.send_error(502)

        do_CONNECT = do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], hosts
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
