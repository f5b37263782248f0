"""Which caption a sample has: that of its .txt, one of the lines in it, or a field of its .json."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dalle1.data.raw_sample import BadSampleError, RawSample

_JSON = "json:"


@dataclass(frozen=True, kw_only=True)
class CaptionSource:
    """Where captions stand."""

    setting: str = "text"  # `text`: the .txt; `lines`: each line of it is one; `json:FIELD`: a text or a list of texts

    def __post_init__(self) -> None:
        """Refuse other settings. Raises: TypeError or ValueError."""
        if not isinstance(self.setting, str):
            raise TypeError(f"caption must be text, lines or json:FIELD, got {self.setting!r}")
        if self.setting not in ("text", "lines") and not self.setting.removeprefix(_JSON).strip():
            raise ValueError(f"caption must name a field after '{_JSON}', got {self.setting!r}")
        if self.setting not in ("text", "lines") and not self.setting.startswith(_JSON):
            raise ValueError(f"caption must be text, lines or json:FIELD, got {self.setting!r}")

    def read(self, sample: RawSample) -> list[str]:
        """All captions of a sample, without white space around them and at least one.

        Raises: BadSampleError if it has none, or none that can be read.
        """
        captions = self._read(sample)
        captions = [caption for caption in (caption.strip() for caption in captions) if caption]
        if not captions:
            raise BadSampleError(f"caption of {sample.describe()} is empty", "empty caption")
        try:
            "".join(captions).encode()
        except UnicodeEncodeError as error:  # JSON can hold halves of characters, which no text is made of
            raise BadSampleError(f"caption of {sample.describe()} has half a character", "caption not UTF-8") from error
        return captions

    def _read(self, sample: RawSample) -> list[str]:
        if not self.setting.startswith(_JSON):
            text = sample.text()
            return text.splitlines() if self.setting == "lines" else [text]
        field = self.setting.removeprefix(_JSON)
        value = sample.metadata().get(field)
        if value is None:
            raise BadSampleError(f"metadata of {sample.describe()} has no field {field!r}", "no caption")
        captions = [value] if isinstance(value, str) else value
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise BadSampleError(
                f"field {field!r} of the metadata of {sample.describe()} must be a text or a list of texts, got "
                f"{type(value).__name__}",
                "caption no text",
            )
        return captions


def draw_caption(captions: list[str], draw: str | None) -> str:
    """One of a sample's captions: the first without a draw, else one that the text `draw` decides."""
    if draw is None or len(captions) == 1:
        return captions[0]
    digest = hashlib.sha256(f"caption|{draw}".encode()).digest()
    return captions[int.from_bytes(digest[:8], "big") % len(captions)]
