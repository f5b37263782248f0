"""Make shards of colour emoji from an installed Noto Color Emoji font and Unicode's names (see data/README.md)."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from dalle1.atomic_files import atomic_directory, check_directory
from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.data.shard_writer import EncodedPicture, write_shard

# Where Debian's packages put them.
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
BITMAP_SIZE = 109  # of the font: FreeType takes no other
# A line of emoji-test.txt: 2764 FE0F ; fully-qualified # ❤️ E0.6 red heart
_LINE = re.compile(r"(?P<codes>[0-9A-F ]+?) *; fully-qualified +# \S+ E[0-9.]+ (?P<name>.+)")
_SKIN_TONES = dict.fromkeys(range(0x1F3FB, 0x1F400))
_SMILEY, _NO_CHARACTER, _LAST_TAG = "\U0001f600", "\U0010ffff", "\U000e007f"


def read_names(path: Path) -> dict[str, str]:
    """Names of emoji, each a string of one or more code points, in Unicode's order.

    Punctuation is left out of names: "couple with heart: person, person" is "couple with heart person person".

    Raises: FileNotFoundError if there is no such file; ValueError if it names no emoji."""
    if not path.is_file():
        raise FileNotFoundError(
            f"names must be Unicode's emoji-test.txt, got no file '{path}'; apt install unicode-data"
        )
    names = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _LINE.fullmatch(line):
            emoji = "".join(chr(int(code, 16)) for code in match["codes"].split())
            names[emoji] = " ".join(re.sub(r"[:,\-“”]", " ", match["name"]).split())
    if not names:
        raise ValueError(f"'{path}' must be Unicode's emoji-test.txt, got a file without such lines")
    return names


class EmojiFont:
    """A font that has a colour bitmap for each emoji."""

    def __init__(self, path: Path) -> None:
        """Open the font file.

        Raises: FileNotFoundError if there is none; ValueError if it is no font or has no colour bitmaps."""
        if not path.is_file():
            raise FileNotFoundError(f"font must be a file, got no '{path}'; apt install fonts-noto-color-emoji")
        try:
            self._font = ImageFont.truetype(str(path), BITMAP_SIZE)
        except OSError as error:
            raise ValueError(f"'{path}' must be Noto Color Emoji with bitmaps, but cannot be read ({error})") from error
        self._left, self._top, right, bottom = map(round, self._font.getbbox(_SMILEY))
        self._size = (max(right - self._left, 1), max(bottom - self._top, 1))
        self._advance = self._font.getlength(_SMILEY)
        red, green, blue = self._paint(_SMILEY).split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            raise ValueError(f"'{path}' must be Noto Color Emoji with bitmaps, got a font without a coloured {_SMILEY}")

    @property
    def joins(self) -> bool:
        """Whether several code points can become one picture: skin tones, flags, families."""
        return self._font.layout_engine == ImageFont.Layout.RAQM

    def draw(self, emoji: str) -> Image.Image | None:
        """The emoji on white, or None if the font has no single picture of it."""
        # A variation selector asks for the colours that this font has anyway; the basic layout draws a box for it.
        plain = emoji.replace("\ufe0f", "")
        text = emoji if self.joins else plain
        # Wider than one emoji are several side by side, which are no picture of this name.
        if abs(self._font.getlength(text) - self._advance) > 1:
            return None
        picture = self._paint(text)
        # A flag of tags that the font does not know is drawn as the plain flag before them, for tags are invisible.
        wrong = [_NO_CHARACTER, *([text[0]] if _LAST_TAG in text else [])]
        return None if picture in map(self._paint, wrong) else picture

    def _paint(self, text: str) -> Image.Image:
        picture = Image.new("RGB", self._size, "white")
        ImageDraw.Draw(picture).text((-self._left, -self._top), text, "black", self._font, embedded_color=True)
        return picture


def encode(emoji: str, name: str, picture: Image.Image, side: int) -> EncodedPicture:
    """A picture as JPEG of side x side pixels, with its name as caption."""
    file = io.BytesIO()
    # The font's bitmaps are a little wider than high, and empty at the left and the right.
    ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS).save(file, "jpeg", quality=95)
    codes = {"codepoints": " ".join(f"{ord(character):04X}" for character in emoji)}
    return EncodedPicture(extension="jpg", data=file.getvalue(), width=side, height=side, caption=name, metadata=codes)


def is_validation(emoji: list[str], every: int) -> list[bool]:
    """For each emoji whether it is one of each `every` that are set aside; skin tones of one emoji go together."""
    plain = [text.translate(_SKIN_TONES) for text in emoji]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(plain), 1)}
    return [numbers[text] % every == 0 for text in plain]


@errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Write `train-00000.tar`, ..., `val-00000.tar`, ... to a new directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--names", type=Path, default=NAMES, help="Unicode's emoji-test.txt")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="new directory for the shards")
    parser.add_argument("--image-size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--val-every", type=int, default=5, help="of so many emoji one is for validation")
    options = parser.parse_args(arguments)
    require_int("samples-per-shard", options.samples_per_shard, at_least=1)
    require_int("image-size", options.image_size, at_least=1)
    require_int("val-every", options.val_every, at_least=2)
    check_directory(options.out)
    names, font = read_names(options.names), EmojiFont(options.font)
    encoded = {}
    for emoji, name in tqdm(names.items(), desc="emoji", unit="picture", disable=None):
        if picture := font.draw(emoji):
            encoded[emoji] = encode(emoji, name, picture, options.image_size)
    splits: dict[str, list[EncodedPicture]] = {"train": [], "val": []}
    for emoji, val in zip(encoded, is_validation(list(encoded), options.val_every), strict=True):
        splits["val" if val else "train"].append(encoded[emoji])
    if not all(splits.values()):
        at_least, found = options.val_every, len(encoded)
        raise ValueError(f"'{options.names}' must name at least {at_least} emoji that the font has, got {found}")
    with atomic_directory(options.out) as directory:
        for split, samples in splits.items():
            for number, first in enumerate(range(0, len(samples), options.samples_per_shard)):
                part = samples[first : first + options.samples_per_shard]
                write_shard(directory / f"{split}-{number:05d}.tar", part, first=first)
    print(f"'{options.out}' has {len(splits['train'])} pictures for training and {len(splits['val'])} for validation")
    if missing := len(names) - len(encoded):
        hint = "" if font.joins else "; skin tones, flags and families need FriBiDi: apt install libfribidi0"
        print(f"{missing} emoji are left out, of which the font gives no single picture{hint}")


if __name__ == "__main__":
    main()
