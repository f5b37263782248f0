"""A page's server in this process, on a port of its own, as browsers see it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from dalle1.pipeline import Pipeline
from dalle1.web.asked import Limits
from dalle1.web.kept import Kept
from dalle1.web.server import Server, make_app
from dalle1.web.studio import Decoding, Studio

START = {
    "prompt": None,
    "negative_prompt": None,
    "candidates": 3,
    "keep": None,
    "seed": 0,
    "temperature": 0.7,
    "temperature_end": None,
    "top_k": 0,
    "top_p": 1.0,
    "guidance_scale": 1.0,
    "paste_kept": False,
}


@contextmanager
def serving(
    pipeline: Pipeline, directory: Path, *, limits: Limits | None = None, preview_share: float = 1.0
) -> Iterator[str]:
    """The page's address, while it is served; results are in `directory`."""
    limits = limits or Limits()
    kept = Kept(directory, limits.results)
    decoding = Decoding(dtype=torch.float32, preview_share=preview_share)
    studio = Studio(pipeline, kept, decoding, {"name": "tiny"})
    app = make_app(Server(studio, pipeline, kept, limits=limits, start=START), names=["my-box"])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    listener = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def read_events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and data of server-sent events, as they come."""
    kind = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def sample(client: httpx.Client, **request: Any) -> dict[str, Any]:
    """What `done` tells of a request that succeeds."""
    with client.stream("POST", "/requests", json=request) as response:
        events = list(read_events(response))
    assert events[-1][0] == "done", events[-1]
    return events[-1][1]
