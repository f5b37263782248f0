"""What the page's program keeps of its users: uploaded pictures, and results as directories; the oldest go first."""

from __future__ import annotations

import io
import json
import secrets
import shutil
import threading
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dalle1.data.sampled_picture import MANIFEST_NAME, SampledPicture, read_sampled_picture
from dalle1.data.transforms import decode_image, fit_picture


@dataclass(frozen=True, kw_only=True, eq=False)
class Upload:
    """A picture to go on from."""

    picture: Image.Image  # RGB, of the model's size
    sampled: SampledPicture | None  # what its file says of its origin


def read_upload(data: bytes, *, size: tuple[int, int], max_megapixels: float) -> Upload:
    """The picture of a file, cropped and resized to `size`, height and width in pixels.

    Raises: ValueError if it is no JPEG, PNG or WebP file, is damaged or too large.
    """
    try:
        picture = decode_image(data, max_megapixels=max_megapixels)
    except ValueError as error:
        raise ValueError(f"a picture must be a JPEG, PNG or WebP file; this one cannot be read: {error}") from error
    fitted = Image.fromarray(fit_picture(picture, *size).permute(1, 2, 0).contiguous().numpy())
    return Upload(picture=fitted, sampled=read_sampled_picture(data))


@dataclass(frozen=True, kw_only=True)
class Result:
    """The directory of a finished request, as `results.SampleRun` writes it, and what is in it."""

    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Result:
        """That of a directory."""
        return cls(directory=directory, manifest=json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8")))

    @property
    def entry(self) -> dict[str, Any]:
        """Prompt, number of candidates and pictures, best first."""
        return dict(self.manifest["prompts"][0])

    def picture(self, candidate: int) -> Path | None:
        """The file of a candidate, None if it was not kept or there is none."""
        files = {picture["candidate"]: picture["file"] for picture in self.entry["pictures"]}
        return self.directory / files[candidate] if candidate in files else None

    def zip(self, name: str) -> bytes:
        """All its files, in a folder `name`.

        Raises: OSError if it goes meanwhile.
        """
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:  # pictures are compressed as they are
            for path in sorted(self.directory.rglob("*")):
                if path.is_file():
                    archive.write(path, f"{name}/{path.relative_to(self.directory).as_posix()}")
        return buffer.getvalue()


class Kept:
    """Uploads and results under names that nobody guesses; of each the latest `most`."""

    def __init__(self, directory: Path, most: int) -> None:
        """Keep results in `directory`, which is empty."""
        self._directory, self._most = directory, most
        self._lock = threading.Lock()
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._results: OrderedDict[str, Result] = OrderedDict()

    def add_upload(self, upload: Upload) -> str:
        """Keep a picture; gives its name."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._uploads[name] = upload
            while len(self._uploads) > self._most:
                self._uploads.popitem(last=False)
        return name

    def upload(self, name: str) -> Upload | None:
        """The picture of this name, None if there is none or it has gone; it is the latest now."""
        with self._lock:
            if name in self._uploads:
                self._uploads.move_to_end(name)
            return self._uploads.get(name)

    def new_directory(self) -> Path:
        """A directory for a result, which is made by who writes there."""
        return self._directory / secrets.token_hex(16)

    def add_result(self, directory: Path) -> tuple[str, Result]:
        """Keep a directory that was written; gives its name, too."""
        name, result = secrets.token_urlsafe(16), Result.read(directory)
        gone = []
        with self._lock:
            self._results[name] = result
            while len(self._results) > self._most:
                gone.append(self._results.popitem(last=False)[1])
        for each in gone:
            shutil.rmtree(each.directory, ignore_errors=True)
        return name, result

    def result(self, name: str) -> Result | None:
        """The result of this name, None if there is none or it has gone."""
        with self._lock:
            return self._results.get(name)
