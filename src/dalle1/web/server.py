"""The page's addresses.

| | |
|---|---|
| `GET /` | the page |
| `GET /facts` | what it shows of the model: sizes, limits, settings at first |
| `POST /pictures` | a picture's file; answers with its name here and how the model sees it |
| `POST /requests` | a JSON object (`asked.read_asked`); answers with server-sent events until its pictures are done |
| `GET /results/ID`, `/results/ID/CANDIDATE.png`, `/results/ID.zip` | pictures that are done |

A request lives as long as its answer is read: who closes the connection gives up the place in the line. What is wrong
is answered as JSON with one sentence, `{"error": ...}`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from dalle1.html_page import embed, own_code_alone, read_page
from dalle1.pipeline import Pipeline
from dalle1.run_origin import slug
from dalle1.web.asked import Limits, read_asked
from dalle1.web.guard import Guard
from dalle1.web.jobs import ENDS, Job, JobQueue, QueueFullError
from dalle1.web.kept import Kept, Result, read_upload
from dalle1.web.studio import Studio, describe_result

_MOST_REQUEST_BYTES = 200_000  # of JSON: a prompt, some numbers, and a mask of up to 300 x 300 cells
_MOST_UPLOADS = 4  # at once; each takes the memory of its file, and who sends slowly holds a place
_READING_SECONDS = 60  # for a body to arrive
_UNKNOWN = "there is nothing at this address; the page itself is at /"


class Server:
    """Answers requests: reads and checks them, lets them wait, and hands on what is told of them."""

    def __init__(
        self, studio: Studio, pipeline: Pipeline, kept: Kept, *, limits: Limits, start: Mapping[str, Any]
    ) -> None:
        """Start the queue; `start` are the settings that the page shows at first."""
        self._studio, self._pipeline, self._kept, self._limits = studio, pipeline, kept, limits
        self._start = dict(start)
        self.queue = JobQueue(limits.waiting)
        config = pipeline.transformer.model.config
        cell = pipeline.image_tokenizer.dvae.config.downsampling
        self._grid = config.grid_height, config.grid_width
        self._size = self._grid[0] * cell, self._grid[1] * cell
        self._uploading = asyncio.Semaphore(_MOST_UPLOADS)
        self._decoding = asyncio.Lock()  # a decoded picture takes much more memory than its file

    async def facts(self) -> dict[str, Any]:
        """Of the model and the page."""
        reranker = self._pipeline.reranker
        return {
            "grid": self._grid,
            "size": self._size,
            "has_guidance": self._pipeline.transformer.caption_dropout > 0,
            "reranker": dict(reranker.facts)["kind"] if reranker else None,
            "limits": {"candidates": self._limits.candidates, "upload_megabytes": self._limits.upload_megabytes},
            "start": self._start,
        }

    async def upload(self, request: Request) -> dict[str, Any]:
        """Keep the picture that a request's body is."""
        most = int(self._limits.upload_megabytes * 1e6)
        async with self._uploading:
            data = await _read_body(request, most, f"a picture's file must have at most {most / 1e6:g} MB")
            async with self._decoding:
                upload = await run_in_threadpool(
                    read_upload, data, size=self._size, max_megapixels=self._limits.upload_megapixels
                )
        prompt = upload.sampled.prompt if upload.sampled else None
        return {"picture": self._kept.add_upload(upload), "prompt": prompt, **embed(upload.picture)}

    async def sample(self, request: Request) -> Response:
        """Let a request wait for its turn; its answer tells all that becomes of it."""
        most = f"a request must have at most {_MOST_REQUEST_BYTES / 1e6:g} MB"
        body = await _read_body(request, _MOST_REQUEST_BYTES, most)
        asked = await run_in_threadpool(read_asked, body, pipeline=self._pipeline, limits=self._limits)
        upload = None
        if asked.picture is not None:
            upload = self._kept.upload(asked.picture)
            if upload is None:
                raise HTTPException(404, "the picture to go on from is not kept any more; choose it again")
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with suppress(RuntimeError):  # of a loop that has been closed: nobody listens any more
                loop.call_soon_threadsafe(changed.set)

        job = self.queue.submit(partial(self._studio.work, asked, upload), notify)
        return _Telling(_tell(job, changed), on_end=partial(self.queue.leave, job))

    async def result(self, name: str) -> dict[str, Any]:
        """Prompt, settings and scores of pictures that are done."""
        return describe_result(name, self._result(name))

    async def picture(self, name: str, candidate: int) -> Response:
        """A picture's file, as sample.py writes it."""
        path = self._result(name).picture(candidate)
        if path is None:
            raise HTTPException(404, f"candidate {candidate} is not among the pictures of this request")
        return _file(await _read_kept(path.read_bytes), "image/png", path.name, how="inline")

    async def archive(self, name: str) -> Response:
        """All that sample.py writes for a request, as a zip."""
        result = self._result(name)
        stem = slug(result.entry["prompt"])
        return _file(await _read_kept(partial(result.zip, stem)), "application/zip", f"{stem}.zip", how="attachment")

    def _result(self, name: str) -> Result:
        result = self._kept.result(name)
        if result is None:
            raise HTTPException(404, _GONE)
        return result


class _Telling(StreamingResponse):
    """Server-sent events; `on_end` is called when they end and also if nobody reads any more, even before the first."""

    def __init__(self, events: AsyncIterator[str], *, on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_NOT_STORED)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _tell(job: Job, changed: asyncio.Event) -> AsyncIterator[str]:
    while True:
        await changed.wait()
        changed.clear()
        for kind, data in job.take():
            yield f"event: {kind}\ndata: {json.dumps(data)}\n\n"
            if kind in ENDS:
                return


_GONE = "the pictures of this request are not kept any more; sample them again"
_NOT_STORED = {"Cache-Control": "no-store"}
_LOADS = "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"  # from this server, and framed by nobody


def make_app(server: Server, *, names: Collection[str]) -> FastAPI:
    """The page as an ASGI application; `names` are those of its machine that may stand in an address bar."""
    page = read_page("web/page.html")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.queue.close()
        await run_in_threadpool(server.queue.join)

    # No pages that describe the addresses: they would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, names=names, content_security_policy=f"{own_code_alone(page)}; {_LOADS}")

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers=_NOT_STORED)

    # The path convertors let through whole numbers and names without a slash.
    app.add_api_route("/facts", server.facts, methods=["GET"])
    app.add_api_route("/pictures", server.upload, methods=["POST"])
    app.add_api_route("/requests", server.sample, methods=["POST"])
    app.add_api_route("/results/{name}.zip", server.archive, methods=["GET"])
    app.add_api_route("/results/{name}", server.result, methods=["GET"])
    app.add_api_route("/results/{name}/{candidate:int}.png", server.picture, methods=["GET"])
    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> Response:
        sentence = error.detail if isinstance(error, HTTPException) else _UNKNOWN
        return JSONResponse({"error": sentence}, error.status_code)

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> Response:
        return JSONResponse({"error": str(error)}, 503)

    @app.exception_handler(ValueError)
    @app.exception_handler(TypeError)
    async def wrong(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        sentence = f"the page's program has failed ({type(error).__name__}); its terminal says why"
        return JSONResponse({"error": sentence}, 500)


async def _read_body(request: Request, most: int, sentence: str) -> bytes:
    """The whole body; one of more than `most` bytes, and one that does not come, are not waited for."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(_READING_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise HTTPException(413, sentence)
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(408, f"what is sent must arrive within {_READING_SECONDS} seconds; try again") from error
    return b"".join(parts)


async def _read_kept(read: Any) -> bytes:
    """What `read` gives, in a thread; its file may go meanwhile."""
    try:
        return bytes(await run_in_threadpool(read))
    except OSError as error:
        raise HTTPException(404, _GONE) from error


def _file(content: bytes, media_type: str, name: str, *, how: str) -> Response:
    """A file to show (`inline`) or to save (`attachment`), which never changes."""
    headers = {
        "Content-Disposition": f'{how}; filename="{name}"',
        "Cache-Control": "private, max-age=3600, immutable",
    }
    return Response(content, media_type=media_type, headers=headers)
