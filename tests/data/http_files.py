"""A web server for the tests of what is read from elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Quiet(SimpleHTTPRequestHandler):
    """Files of a folder; the first answers to each name in `breaks` end after these shares of the file."""

    breaks: dict[str, list[float]]
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer, or break off."""
        self.asked.append(self.path)
        if shares := self.breaks.get(self.path):
            share = shares.pop(0)
            content = Path(self.directory, self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: int(share * len(content))])
            self.close_connection = True
            return
        super().do_GET()


@contextmanager
def serve(folder: Path, *, breaks: dict[str, list[float]] | None = None) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of the files in `folder`, and the list of what it is asked for."""
    asked: list[str] = []
    handler = type("Handler", (_Quiet,), {"breaks": dict(breaks or {}), "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
