"""Captioned pictures, good and bad ones, and a server on this machine that offers them."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from dalle1.data.shapes import SceneMix, draw, make_sample
from dalle1.data.shards import ShardIndex

REPOSITORY = Path(__file__).parents[2]
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")


def encode(picture: Image.Image, image_format: str = "jpeg", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return file.getvalue()


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Soft colours with some noise: a picture that is neither drawn nor plain."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(soft, dtype=np.float64) + rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def emoji_or_shapes(directory: Path, count: int) -> list[tuple[bytes, str]]:
    """Drawn pictures of 256 x 256 pixels with their captions: emoji if a font of them is installed, or else shapes."""
    if not (EMOJI_FONT.is_file() and EMOJI_NAMES.is_file()):
        samples = [make_sample(0, i, SceneMix()) for i in range(count)]
        return [(encode(Image.fromarray(draw(sample.scene, 256)), "png"), sample.caption) for sample in samples]
    lines = EMOJI_NAMES.read_text(encoding="utf-8").splitlines()
    names = directory / "names.txt"
    names.write_text("\n".join([line for line in lines if "; fully-qualified" in line][:count]), encoding="utf-8")
    recipe = [sys.executable, REPOSITORY / "data" / "make_emoji.py", "--names", names, "--out", directory / "emoji"]
    subprocess.run(recipe, check=True, capture_output=True)
    index = ShardIndex(str(directory / "emoji" / "*.tar"))
    return [(index[i].image(), index[i].text()) for i in range(len(index))]


def unusual_pictures() -> dict[str, bytes]:
    """Pictures that img2dataset can read, though they are no plain JPEGs."""
    picture = photo(1, 450, 600)
    exif = Image.Exif()
    exif[0x112] = 6  # lies on its side
    return {
        "grey.png": encode(picture.convert("L"), "png"),
        "palette.png": encode(picture.convert("P"), "png"),
        "transparent.png": encode(picture.convert("RGBA"), "png"),
        "cmyk.jpg": encode(picture.convert("CMYK")),
        "webp.webp": encode(picture, "webp"),
        "animation.gif": encode(picture, "gif", save_all=True, append_images=[photo(2, 450, 600)]),
        "turned.jpg": encode(picture, exif=exif),
        "a name with é.jpg": encode(picture),
    }


def bad_pictures() -> dict[str, bytes]:
    """Files that are no pictures, are not whole, or that the recommended settings leave out."""
    whole = encode(photo(3, 450, 600))
    return {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"This is no picture.",
        "page.jpg": b"<!doctype html><title>Not found</title>",
        "small.jpg": encode(photo(3, 300, 200)),
        "wide.jpg": encode(photo(3, 1000, 400)),
        "bomb.png": _png_that_claims_to_be(60_000, 60_000),
    }


def _png_that_claims_to_be(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@dataclass(kw_only=True)
class PictureServer:
    """What the server offers; may be changed while it runs."""

    address: str  # ends with a slash
    files: dict[str, bytes] = field(default_factory=dict)  # by their path without the first slash, quoted as in URLs
    headers: dict[str, dict[str, str]] = field(default_factory=dict)  # further or other ones
    waits: set[str] = field(default_factory=set)  # paths that get no answer until `go_on` is set
    asked: threading.Event = field(default_factory=threading.Event)  # somebody waits
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve_pictures() -> Iterator[PictureServer]:
    """Serve from a free port of this machine until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.removeprefix("/")
            if path in offer.waits:
                offer.asked.set()
                offer.go_on.wait()
            if path not in offer.files:
                self.send_error(404)
                return
            content, headers = offer.files[path], offer.headers.get(path, {})
            self.send_response(302 if "Location" in headers else 200)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Clients that give up are part of the test."""

    with Server(("127.0.0.1", 0), Handler) as server:
        offer = PictureServer(address=f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield offer
        finally:
            offer.go_on.set()
            server.shutdown()
            thread.join()
