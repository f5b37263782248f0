"""The page's server: pictures are the pipeline's, requests wait for each other, and nobody else gets in."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from gallery_run import NASTY_PROMPTS
from hydra import compose, initialize_config_dir
from PIL import Image
from web_page import read_events, sample, serving

from dalle1 import app
from dalle1.checkpoint import Loaded, load_image_tokenizer, load_transformer
from dalle1.data.sampled_picture import read_sampled_picture
from dalle1.evaluation.pictures import to_uint8
from dalle1.models.transformer import DalleTransformer
from dalle1.pipeline import Pipeline
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.sample import run as run_sample
from dalle1.sampling.filters import SamplingConfig
from dalle1.web.asked import Limits
from dalle1.web.jobs import Job, JobQueue, QueueFullError
from dalle1.web.studio import Decoding

ROOT = Path(__file__).resolve().parent.parent
MASK = [[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 1]]


@pytest.fixture(scope="module")
def pipeline(checkpoints: dict[str, Path]) -> Pipeline:
    return Pipeline.from_checkpoint(
        transformer=checkpoints["transformer"],
        dvae=checkpoints["dvae"],
        reranker=CLIPReranker.load(checkpoints["clip"]),
    )


@pytest.fixture(scope="module")
def client(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    directory = tmp_path_factory.mktemp("results")
    with serving(pipeline, directory) as address, httpx.Client(base_url=address) as client:
        yield client


def _png(size: tuple[int, int] = (16, 12), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(client: httpx.Client, result: dict[str, Any]) -> np.ndarray:
    """uint8 (n, h, w, 3) of a result's files, in its order."""
    files = [client.get(f"/results/{result['result']}/{each['candidate']}.png") for each in result["pictures"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(file.content))) for file in files])


def _error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status
    answer = response.json()
    assert list(answer) == ["error"]
    return answer["error"]


# --- pictures ---


def test_pictures_are_those_of_the_pipeline_bit_for_bit(client: httpx.Client, pipeline: Pipeline) -> None:
    settings = {"temperature": 0.9, "temperature_end": 0.5, "top_k": 20, "top_p": 0.9}
    result = sample(client, prompt=" a red circle\n", candidates=4, keep=3, seed=7, **settings)
    (expected,) = pipeline(["a red circle"], candidates=4, keep=3, seed=7, sampling=SamplingConfig(**settings))
    assert (result["prompt"], result["sampled"]) == ("a red circle", 4)
    assert [each["candidate"] for each in result["pictures"]] == expected.candidates
    assert [each["score"] for each in result["pictures"]] == expected.scores
    assert np.array_equal(_pixels(client, result), to_uint8(expected.images))
    assert result["settings"] | settings == result["settings"]
    first = client.get(f"/results/{result['result']}/{expected.candidates[0]}.png")
    sampled = read_sampled_picture(first.content)
    assert sampled is not None
    assert sampled.image_tokens is not None
    assert torch.equal(sampled.image_tokens, expected.image_tokens[0])
    assert first.headers["content-disposition"] == f'inline; filename="{result["pictures"][0]["file"]}"'


def test_picture_is_gone_on_from_as_the_pipeline_does_it(client: httpx.Client, pipeline: Pipeline) -> None:
    data = _png((30, 20))
    upload = client.post("/pictures", content=data).json()
    assert (upload["width"], upload["height"], upload["prompt"]) == (16, 12, None)
    asked = {"candidates": 3, "picture": upload["picture"], "again": MASK, "paste_kept": True}
    result = sample(client, prompt="a blue square", **asked)
    mask = Image.fromarray(np.array(MASK, dtype=np.uint8) * 255)
    image_prompt = pipeline.image_prompt(Image.open(io.BytesIO(data)), mask=mask, paste_kept=True)
    (expected,) = pipeline(["a blue square"], candidates=3, image_prompt=image_prompt)
    assert np.array_equal(_pixels(client, result), to_uint8(expected.images))


def test_own_picture_brings_its_tokens_and_its_prompt(client: httpx.Client) -> None:
    first = sample(client, prompt="a red circle", candidates=1)
    own = client.get(f"/results/{first['result']}/0.png").content
    upload = client.post("/pictures", content=own).json()
    assert upload["prompt"] == "a red circle"
    second = sample(client, prompt="a blue square", candidates=2, picture=upload["picture"], again=MASK)
    kept = torch.tensor(MASK) == 0
    tokens = [
        read_sampled_picture(client.get(f"/results/{result['result']}/{candidate}.png").content).image_tokens  # type: ignore[union-attr]
        for result, candidate in ((first, 0), (second, 0), (second, 1))
    ]
    assert torch.equal(tokens[1][kept], tokens[0][kept])  # type: ignore[index]
    assert torch.equal(tokens[2][kept], tokens[0][kept])  # type: ignore[index]


def test_rows_come_one_after_the_other_and_then_the_ranked_pictures(client: httpx.Client, pipeline: Pipeline) -> None:
    with client.stream("POST", "/requests", json={"prompt": "a red circle", "candidates": 2}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(read_events(response))
    kinds = [kind for kind, _ in events]
    assert kinds[0] in ("waiting", "started")  # what is not read before the next of its kind comes is not told
    assert kinds[-1] == "done"
    previews = [data for kind, data in events if kind == "preview"]
    rows = [data["rows"] for data in previews]
    assert rows == sorted(rows)
    assert rows[-1] == 3
    (expected,) = pipeline(["a red circle"], candidates=2, keep=None)
    for data in previews:
        assert [each["candidate"] for each in data["pictures"]] == [0, 1]
        picture = np.asarray(_open_uri(data["pictures"][1]["uri"]))
        assert picture.shape == (12, 16, 3)
        assert (picture[4 * data["rows"] :] == round(0.75 * 255)).all()
    last = np.stack([np.asarray(_open_uri(each["uri"])) for each in previews[-1]["pictures"]])
    order = np.argsort(expected.candidates)
    assert np.array_equal(last, to_uint8(expected.images)[order])
    progress = [data for kind, data in events if kind == "progress" and data["phase"] == "sampling"]
    assert progress[-1]["done"] == progress[-1]["total"] == 24
    assert progress[-1]["seconds_left"] == 0


def _open_uri(uri: str) -> Image.Image:
    import base64

    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))


def test_what_stays_of_a_picture_is_seen_from_the_first_row_on(client: httpx.Client) -> None:
    upload = client.post("/pictures", content=_png()).json()
    asked = {"prompt": "a", "picture": upload["picture"], "again": MASK}
    with client.stream("POST", "/requests", json=asked) as response:
        previews = [data for kind, data in read_events(response) if kind == "preview"]
    if previews[0]["rows"] == 1:  # else it came too late to be read
        picture = np.asarray(_open_uri(previews[0]["pictures"][0]["uri"]))
        is_grey = (picture == round(0.75 * 255)).all(-1).reshape(3, 4, 4, 4).all((1, 3))
        assert is_grey.tolist() == np.array(MASK, dtype=bool).tolist()


def test_zip_is_what_sample_py_writes(
    client: httpx.Client, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = sample(client, prompt="a red circle", candidates=2, seed=3)
    answer = client.get(f"/results/{result['result']}.zip")
    assert answer.headers["content-disposition"] == 'attachment; filename="a-red-circle.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        names = {name.removeprefix("a-red-circle/") for name in archive.namelist()}
        manifest = json.loads(archive.read("a-red-circle/manifest.json"))
        for each in result["pictures"]:
            shown = client.get(f"/results/{result['result']}/{each['candidate']}.png").content
            assert archive.read(f"a-red-circle/{each['file']}") == shown
    pictures = {each["file"] for each in result["pictures"]}
    assert names == {"manifest.json", "grid.png", "index.html", "tokens/0001.npy", "tokens/0001.json"} | pictures
    monkeypatch.chdir(run_directory)
    options = ["prompt=a red circle", "candidates=2", "seed=3", "temperature=1.0", f"out={tmp_path / 'same'}"]
    run_sample(_configuration(*options, of="sample"))
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        for name in (*pictures, "grid.png", "tokens/0001.npy", "tokens/0001.json"):
            assert archive.read(f"a-red-circle/{name}") == (tmp_path / "same" / name).read_bytes(), name
    same = json.loads((tmp_path / "same" / "manifest.json").read_text(encoding="utf-8"))
    for part in ("format_version", "origin", "checkpoints", "reranker", "prompts", "versions"):
        assert manifest[part] == same[part]
    assert manifest["prompts"][0]["pictures"] == result["pictures"]
    assert manifest["settings"] == result["settings"]
    assert (manifest["settings"]["seed"], manifest["settings"]["name"], manifest["complete"]) == (3, "tiny", True)


@pytest.mark.parametrize("prompt", NASTY_PROMPTS[:-1])
def test_hostile_prompts_stay_text(client: httpx.Client, pipeline: Pipeline, prompt: str) -> None:
    fits = prompt[:6]  # the tiny model's texts are short
    result = sample(client, prompt=fits, candidates=1)
    assert result["prompt"] == fits.strip()
    name = client.get(f"/results/{result['result']}.zip").headers["content-disposition"]
    assert re.fullmatch(r'attachment; filename="[a-z0-9-]+\.zip"', name)
    long = _error(client.post("/requests", json={"prompt": prompt * 3}), 400)
    assert long.startswith("prompt must have at most 40 tokens")


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": " "}, "prompt must not be empty"),
        ({"prompt": None}, "prompt must be a text, got NoneType"),
        ({"prompt": "\ud800"}, "prompt must be valid Unicode"),
        ({"candidates": 65}, "candidates must be at most 64 here, got 65"),
        ({"candidates": 0}, "candidates must be >= 1, got 0"),
        ({"candidates": "3"}, "candidates must be an integer"),
        ({"keep": 3}, "keep must be at most the number of candidates, 2, got 3"),
        ({"keep": 0}, "keep must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"temperature": -1}, "temperature must be a finite number"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": [1, 1]}, "temperature must be one number or one for each of 3 rows, got 2"),
        ({"top_p": 2}, "top_p must be in (0, 1]"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"guidance_scale": 2}, "guidance needs a transformer trained with"),
        ({"negative_prompt": "b"}, "a negative prompt needs a guidance_scale other than 1"),
        ({"negative_prompt": " "}, "negative_prompt must not be empty"),
        ({"picture": "x"}, "picture and again must be given together"),
        ({"again": MASK}, "picture and again must be given together"),
        ({"paste_kept": True}, "paste_kept says what of a picture stays"),
        ({"paste_kept": 1}, "paste_kept must be true or false"),
        ({"picture": 1, "again": MASK}, "picture must be a text, got int"),
        ({"picture": "x", "again": MASK[:2]}, "again must have 3 rows of 4 cells"),
        ({"picture": "x", "again": [[0] * 4, 1, 2]}, "again must have 3 rows of 4 cells"),
        ({"picture": "x", "again": [[2] * 4] * 3}, "cells of again must be 0, which stays, or 1"),
        ({"picture": "x", "again": [[1] * 4] * 3}, "some cells of the picture must stay"),
        ({"picture": "x", "again": [[0] * 4] * 3}, "some cells of the picture must be marked"),
        ({"prompts_file": "/etc/passwd"}, "a request has no field 'prompts_file'"),
    ],
)
def test_wrong_request_gets_one_sentence(client: httpx.Client, change: dict[str, Any], sentence: str) -> None:
    body = json.dumps({"prompt": "a", "candidates": 2} | change)
    error = _error(client.post("/requests", content=body), 400)
    assert error.startswith(sentence)
    assert "\n" not in error


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff", b"[1]", b'{"seed": ' + b"9" * 5000 + b"}"])
def test_what_is_no_request_is_told(client: httpx.Client, body: bytes) -> None:
    assert _error(client.post("/requests", content=body), 400).startswith("a request must be a JSON object")


def test_bodies_are_read_up_to_a_limit(pipeline: Pipeline, tmp_path: Path) -> None:
    limits = Limits(upload_megabytes=0.001)
    with serving(pipeline, tmp_path, limits=limits) as address, httpx.Client(base_url=address) as client:
        assert _error(client.post("/requests", content=b" " * 200_001), 413) == "a request must have at most 0.2 MB"
        sentence = "a picture's file must have at most 0.001 MB"
        assert _error(client.post("/pictures", content=b"x" * 1001), 413) == sentence
        # Without a length that is said before.
        assert _error(client.post("/pictures", content=(b"x" * 100 for _ in range(11))), 413) == sentence


def test_body_that_does_not_come_is_not_waited_for(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.web.server._READING_SECONDS", 0.1)
    host = str(client.base_url.host)
    with socket.create_connection((host, client.base_url.port or 80)) as connection:
        connection.sendall(f"POST /pictures HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n".encode())
        answer = b""
        while b"}" not in answer:
            answer += connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"what is sent must arrive within 0.1 seconds" in answer


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"GIF89a", "it is not a JPEG, PNG or WebP file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is not a JPEG, PNG or WebP file"),
        (_png()[:-30], ""),
        (_png((600, 400)), "it has 0.2 megapixels, more than the 0.1 allowed"),
    ],
)
def test_bad_pictures_are_told(pipeline: Pipeline, tmp_path: Path, data: bytes, reason: str) -> None:
    limits = Limits(upload_megapixels=0.1)
    with serving(pipeline, tmp_path, limits=limits) as address:
        error = _error(httpx.post(f"{address}/pictures", content=data), 400)
    assert error.startswith(f"a picture must be a JPEG, PNG or WebP file; this one cannot be read: {reason}")


def test_large_picture_is_refused_before_it_is_decoded(client: httpx.Client) -> None:
    # 12,000 x 12,000 pixels of one colour: 432 MB once they are decoded, 18 kB as a file.
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    memory = psutil.Process().memory_info().rss
    error = _error(client.post("/pictures", content=buffer.getvalue()), 400)
    assert "megapixels" in error
    assert psutil.Process().memory_info().rss < memory + 200e6


def test_unknown_addresses_are_told(client: httpx.Client) -> None:
    gone = "the pictures of this request are not kept any more; sample them again"
    assert _error(client.get("/results/x"), 404) == _error(client.get("/results/x.zip"), 404) == gone
    assert _error(client.get("/results/x/0.png"), 404) == gone
    result = sample(client, prompt="a", candidates=1)
    assert "candidate 1 is not among" in _error(client.get(f"/results/{result['result']}/1.png"), 404)
    for path in ("/nothing", "/requests", "/docs", "/openapi.json", f"/results/{result['result']}/../../x"):
        assert client.get(path).status_code in (404, 405)
        assert "error" in client.get(path).json()
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", f"{result['result']}%00"):
        assert client.get(f"/results/{name}").status_code == 404
        assert client.get(f"/results/{name}.zip").status_code == 404
    asked = {"prompt": "a", "picture": "../x", "again": MASK}
    assert "not kept any more; choose it again" in _error(client.post("/requests", json=asked), 404)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "[", ""])
def test_other_names_are_refused(client: httpx.Client, host: str) -> None:
    for path in ("/", "/facts"):
        assert "allowed_hosts" in _error(client.get(path, headers={"Host": host}), 403)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:7860", "LOCALHOST", "[::1]:7860", "192.168.0.7:80", "my-box"])
def test_own_names_are_answered(client: httpx.Client, host: str) -> None:
    assert client.get("/facts", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "http://[", ""])
def test_other_pages_are_refused(client: httpx.Client, origin: str) -> None:
    answer = client.post("/requests", json={"prompt": "a"}, headers={"Origin": origin})
    assert _error(answer, 403) == "requests of other web pages are refused"
    assert "access-control-allow-origin" not in answer.headers
    own = str(client.base_url).rstrip("/")
    assert client.post("/pictures", content=_png(), headers={"Origin": own}).status_code == 200


def test_page_allows_its_own_script_only(client: httpx.Client) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page.text)
    assert page.headers["x-content-type-options"] == "nosniff"


# --- the line ---


class _Gate:
    """Holds the pipeline at its first decoding step until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from dalle1.web import studio

        self.reached, self.open = threading.Semaphore(0), threading.Event()
        sampled = studio._Told.sampled

        def held(told: Any, progress: Any) -> None:
            self.reached.release()
            assert self.open.wait(60)
            sampled(told, progress)

        monkeypatch.setattr(studio._Told, "sampled", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gate]:
    gate = _Gate(monkeypatch)
    yield gate
    gate.open.set()


def _until(events: Iterator[tuple[str, dict[str, Any]]], kind: str, **data: Any) -> None:
    for told in events:
        if told == (kind, data):
            return
    raise AssertionError(f"{kind} {data} was not told")


ASK = {"prompt": "a red circle", "candidates": 2}


def test_requests_wait_for_each_other_and_move_up(client: httpx.Client, gate: _Gate) -> None:
    with client.stream("POST", "/requests", json=ASK) as first:
        assert gate.reached.acquire(timeout=60)
        with client.stream("POST", "/requests", json=ASK) as second:
            of_second = read_events(second)
            _until(of_second, "waiting", place=1)
            with client.stream("POST", "/requests", json=ASK) as third:
                of_third = read_events(third)
                _until(of_third, "waiting", place=2)
                second.close()  # this user leaves
                _until(of_third, "waiting", place=1)
                gate.open.set()
                assert list(read_events(first))[-1][0] == "done"
                assert list(of_third)[-1][0] == "done"


def test_who_leaves_frees_the_place_between_two_steps(client: httpx.Client, gate: _Gate) -> None:
    with client.stream("POST", "/requests", json=ASK | {"candidates": 64}) as first:
        assert gate.reached.acquire(timeout=60)
        first.close()
    with client.stream("POST", "/requests", json=ASK) as second:
        of_second = read_events(second)
        _until(of_second, "waiting", place=1)
        gate.open.set()
        events = list(of_second)
    assert events[-1][0] == "done"
    # The first one had one step more at most, the second one has 12, and nobody anything after that.
    steps = 1
    while gate.reached.acquire(blocking=False):
        steps += 1
    assert steps <= 2 + 12


def test_full_line_is_told(pipeline: Pipeline, tmp_path: Path, gate: _Gate) -> None:
    with (
        serving(pipeline, tmp_path, limits=Limits(waiting=1)) as address,
        httpx.Client(base_url=address) as client,
        client.stream("POST", "/requests", json=ASK),
        client.stream("POST", "/requests", json=ASK) as second,
    ):
        of_second = read_events(second)  # held, as to leave it is to leave the line
        _until(of_second, "waiting", place=1)
        error = _error(client.post("/requests", json=ASK), 503)
        assert error == "the line must have a free place, all 1 are taken; try again later"
        gate.open.set()


def test_server_that_ends_stops_what_runs_and_what_waits(pipeline: Pipeline, gate: _Gate) -> None:
    queue = JobQueue(2)
    held = threading.Event()

    def work(job: Job) -> None:
        held.set()
        while True:
            job.check()

    running = queue.submit(work, lambda: None)
    assert held.wait(60)
    waiting = queue.submit(work, lambda: None)
    queue.close()
    queue.join()
    assert running.take()[-1] == ("stopped", {})
    assert waiting.take()[-1] == ("stopped", {})
    with pytest.raises(QueueFullError, match="is being ended"):
        queue.submit(work, lambda: None)


def test_request_that_fails_is_told_and_the_next_one_is_served(
    client: httpx.Client, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def last_event() -> tuple[str, dict[str, Any]]:
        with client.stream("POST", "/requests", json=ASK) as response:
            return list(read_events(response))[-1]

    for error, sentence in (
        (ValueError("scores must be finite numbers"), "scores must be finite numbers"),
        (
            torch.OutOfMemoryError("CUDA"),
            "the device's memory is not enough for this request; ask for fewer candidates",
        ),
        (RuntimeError("secret"), "this request has failed (RuntimeError); the terminal of the page says why"),
    ):

        def failing(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Pipeline, "stream", failing)
            kind, data = last_event()
            assert kind == "error"
            assert data["error"].startswith(sentence)
    assert "RuntimeError: secret" in capsys.readouterr().err
    assert last_event()[0] == "done"


def test_slow_reader_costs_no_memory() -> None:
    told = threading.Event()
    job = Job(lambda _: None, told.set)
    for i in range(1000):
        job.tell("preview", {"rows": i})
        job.tell("progress", {"done": i})
    assert told.is_set()
    assert job.take() == [("preview", {"rows": 999}), ("progress", {"done": 999})]
    assert job.take() == []


def test_latest_results_and_uploads_are_kept(pipeline: Pipeline, tmp_path: Path) -> None:
    with (
        serving(pipeline, tmp_path, limits=Limits(results=2)) as address,
        httpx.Client(base_url=address) as client,
    ):
        results = [sample(client, prompt="a", candidates=1, seed=seed) for seed in range(4)]
        uploads = [client.post("/pictures", content=_png()).json()["picture"] for _ in range(3)]
        codes = [client.get(f"/results/{each['result']}").status_code for each in results]
        assert codes == [404, 404, 200, 200]
        assert len(list(tmp_path.iterdir())) == 2
        asked = {"prompt": "a", "again": MASK}
        assert client.post("/requests", json=asked | {"picture": uploads[0]}).status_code == 404
        assert sample(client, **asked, picture=uploads[1])["sampled"] == 1


# --- guidance ---


def test_guided_model_has_guidance_and_negative_prompts(
    make_transformer: Callable[..., DalleTransformer], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load_transformer(checkpoints["transformer"])
    guided: Loaded[DalleTransformer] = Loaded(
        **{name: getattr(loaded, name) for name in loaded.__dataclass_fields__} | {"caption_dropout": 0.1}
    )
    pipeline = Pipeline(guided, load_image_tokenizer(checkpoints["dvae"]))
    with serving(pipeline, tmp_path) as address, httpx.Client(base_url=address) as client:
        facts = client.get("/facts").json()
        assert (facts["has_guidance"], facts["reranker"]) == (True, None)
        assert sample(client, prompt="a")["settings"]["guidance_scale"] == 1.5
        result = sample(client, prompt="a", negative_prompt="b", guidance_scale=2, candidates=2)
    sampling = SamplingConfig(guidance_scale=2)
    (expected,) = pipeline(["a"], negative_prompt="b", sampling=sampling, candidates=2)
    assert [each["score"] for each in result["pictures"]] == [None, None]
    assert result["settings"]["negative_prompt"] == "b"
    assert torch.equal(_tokens(tmp_path), expected.image_tokens)


def _tokens(directory: Path) -> torch.Tensor:
    latest = max(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return torch.from_numpy(np.load(latest / "tokens" / "0001.npy").astype(np.int64))


# --- the command ---


def _configuration(*options: str, of: str = "app") -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(of, list(options))


def test_configuration_states_the_limits_that_hold_without_it() -> None:
    assert Limits(**_configuration().limits) == Limits()
    assert _configuration().preview_share == Decoding(dtype=torch.float32).preview_share


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["prompts_file=p.txt"], "leave out prompts_file=p.txt"),
        (["image=a.png"], "leave out image=a.png"),
        (["variations=4"], "leave out variations=4"),
        (["rerank.only=dir"], "leave out rerank.only=dir"),
        (["out=dir"], "leave out out=dir"),
        (["candidates=65"], "candidates must be at most limits.candidates, 64, got 65"),
        (["limits.waiting=0"], "limits.waiting must be >= 1, got 0"),
        (["limits.upload_megabytes=-1"], "limits.upload_megabytes must be a number above 0, got -1"),
        (["limits.upload_megapixels=200"], "limits.upload_megapixels must be <= 100, more is not decoded, got 200"),
        (["allowed_hosts=box.example.org"], "must be a list of names, as [box.example.org], got box"),
        (["port=65536"], "port must be at most 65535, got 65536"),
        (["port=abc"], "port must be an integer >= 0, got 'abc'"),
        (["host=256.1.1.1"], "cannot take connections at 256.1.1.1:7860"),
        (["top_p=2"], "top_p must be in"),
        (["checkpoint=nothing.ckpt"], "no checkpoint at 'nothing.ckpt'; correct checkpoint="),
        (["checkpoint=."], "checkpoint must be a file RESULTS/transformer/checkpoints/*, got '.'"),
        (["checkpoint=a.ckpt", "transformer=b.ckpt"], "leave out one of them, got transformer=b.ckpt"),
        (["checkpoint=a.ckpt", "results_dir=b"], "leave out one of them, got results_dir=b"),
        (["port=0", "name=nothing"], "no dvae at 'runs/nothing/dvae/checkpoints/last.ckpt'"),
    ],
)
def test_wrong_option_is_told_in_one_sentence(
    options: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, OSError), match=re.escape(sentence)) as caught:
        app.serve(_configuration(*options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("compile=true", "compiled decoding is for CUDA, got device cpu"),
        ("compile=1", "compile must be true or false, got 1"),
        ("batch_size=0", "batch_size must be >= 1, got 0"),
        ("guidance_scale=2", "guidance needs a transformer trained with"),
        ("negative_prompt=b", "a negative prompt needs a guidance_scale other than 1, got 1"),
        ("precision=fp8", "precision must be one of"),
        ("preview_share=2", "preview_share must be in [0, 1], got 2"),
    ],
)
def test_option_that_the_models_cannot_serve_is_told_at_once(
    option: str, sentence: str, run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_directory)
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        app.serve(_configuration("port=0", "device=cpu", option))


def test_checkpoint_brings_what_was_trained_beside_it(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = run_directory / "runs" / "shapes" / "transformer" / "checkpoints" / "last.ckpt"
    cfg = _configuration(f"checkpoint={checkpoint}", "device=cpu")
    app._follow_checkpoint(cfg)
    results = checkpoint.parents[2]
    assert Path(cfg.transformer) == checkpoint
    assert Path(cfg.dvae) == results / "dvae" / "checkpoints" / "last.ckpt"
    assert Path(cfg.rerank.model) == results / "clip" / "checkpoints" / "last.ckpt"
    app.load_pipeline(cfg)  # a transformer with another's dVAE would be refused


@pytest.mark.parametrize("share", [-0.1, 1.1, "all", True])
def test_share_of_previews_is_a_share(share: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"preview_share must be .* \[0, 1\]"):
        Decoding(dtype=torch.float32, preview_share=share)


def test_no_previews_if_they_have_no_share(pipeline: Pipeline, tmp_path: Path) -> None:
    with (
        serving(pipeline, tmp_path, preview_share=0) as address,
        httpx.stream("POST", f"{address}/requests", json=ASK) as response,
    ):
        kinds = {kind for kind, _ in read_events(response)}
    assert "preview" not in kinds
    assert "done" in kinds


def test_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"uvicorn is missing; pip install '\.\[app\]' in the project's directory"):
        app.serve(_configuration())


def test_port_that_is_taken_is_told_and_open_doors_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    with app._listen("127.0.0.1", 0) as listener:
        assert capsys.readouterr().err == ""
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot take connections at 127\.0\.0\.1:{port}.*choose another port="):
            app._listen("127.0.0.1", port)
    with app._listen("0.0.0.0", 0) as listener:
        warning = capsys.readouterr().err
    assert warning.startswith("warning: the page has no password: whoever reaches 0.0.0.0:")


def test_command_serves_until_it_is_ended_and_leaves_nothing(run_directory: Path, tmp_path: Path) -> None:
    """Ended by SIGTERM while it samples."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "runs").symlink_to(run_directory / "runs")
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    environment["TMPDIR"] = str(tmp_path / "tmp")
    options = ["port=0", "precision=bf16", "batch_size=3", 'prompt=it\'s "a", (b) = ${x}', "limits.candidates=100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "dalle1.app", *options],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        address = re.fullmatch(r"the page is at (http://127\.0\.0\.1:\d+)/ \(Ctrl-C ends it\)\n", line)
        assert address, line + process.stderr.read()
        with httpx.Client(base_url=address[1]) as client:
            assert client.get("/").text.startswith("<!doctype html>")
            start = client.get("/facts").json()["start"]
            assert start["prompt"] == 'it\'s "a", (b) = ${x}'
            result = sample(client, prompt="a", candidates=1)
            assert result["settings"]["transformer"] == "runs/shapes/transformer/checkpoints/last.ckpt"
            assert result["settings"]["batch_size"] == 3
            archive = io.BytesIO(client.get(f"/results/{result['result']}.zip").content)
            with zipfile.ZipFile(archive) as files:
                assert json.loads(files.read("a/manifest.json"))["origin"]["dtype"] == "bfloat16"
            with client.stream("POST", "/requests", json=ASK | {"candidates": 100_000}) as response:
                events = read_events(response)
                assert any(kind == "progress" for kind, _ in events)
                process.send_signal(signal.SIGTERM)
                assert list(events)[-1] == ("stopped", {})
        rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, ("", ""))
    assert list((tmp_path / "tmp").iterdir()) == []
