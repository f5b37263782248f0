"""Make shards of colour emoji from the Noto Color Emoji pictures and Unicode's names (see data/README.md)."""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from dalle1.atomic_files import atomic
from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int

# A line of emoji-test.txt: 2764 FE0F ; fully-qualified # ❤️ E0.6 red heart
_LINE = re.compile(r"(?P<codes>[0-9A-F ]+?) *; fully-qualified +# \S+ E[0-9.]+ (?P<name>.+)")


def read_names(path: Path) -> dict[str, str]:
    """Names of emoji by the file names of their pictures, such as `emoji_u2764.png`, in Unicode's order.

    Punctuation is left out of names: "couple with heart: person, person" is "couple with heart person person".

    Raises: FileNotFoundError if there is no such file; ValueError if it names no emoji."""
    names = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _LINE.fullmatch(line):
            codes = [code.lower() for code in match["codes"].split() if code != "FE0F"]
            names[f"emoji_u{'_'.join(codes)}.png"] = " ".join(re.sub(r"[:,\-“”]", " ", match["name"]).split())
    if not names:
        raise ValueError(f"'{path}' must be Unicode's emoji-test.txt, got a file without such lines")
    return names


def encode_on_white(path: Path, side: int) -> bytes:
    """A transparent picture as JPEG on white, side x side pixels."""
    with Image.open(path) as picture:
        pixels = picture.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", pixels.size, "white")
    file = io.BytesIO()
    Image.alpha_composite(white, pixels).convert("RGB").save(file, "jpeg", quality=95)
    return file.getvalue()


def write_shard(path: Path, samples: list[tuple[Path, str]], first: int, side: int) -> None:
    """Write one shard of (picture, name) pairs, whose keys count from `first`; the same input gives the same bytes."""
    with atomic(path) as temporary, open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number, (picture, name) in enumerate(samples, first):
            key = f"{number:09d}"
            metadata = {"caption": name, "key": key, "status": "success", "width": side, "height": side}
            jpeg, text = encode_on_white(picture, side), json.dumps(metadata)
            tar.write({"__key__": key, "jpg": jpeg, "txt": name.encode(), "json": text.encode()})


@errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Write `emoji-00000.tar`, ...; files of these names are replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="directory png/128 of noto-emoji")
    parser.add_argument("--names", type=Path, required=True, help="Unicode's emoji-test.txt")
    parser.add_argument("--out", type=Path, required=True, help="directory for the shards")
    parser.add_argument("--image-size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--samples-per-shard", type=int, default=800)
    options = parser.parse_args(arguments)
    samples = [(options.images / file, name) for file, name in read_names(options.names).items()]
    samples = [(path, name) for path, name in samples if path.is_file()]
    if not samples:
        raise FileNotFoundError(f"'{options.images}' must hold the pictures of noto-emoji, got none that is named")
    require_int("samples-per-shard", options.samples_per_shard, at_least=1)
    require_int("image-size", options.image_size, at_least=1)
    with tqdm(total=len(samples), desc="emoji", unit="picture", disable=None) as bar:
        for number, first in enumerate(range(0, len(samples), options.samples_per_shard)):
            part = samples[first : first + options.samples_per_shard]
            write_shard(options.out / f"emoji-{number:05d}.tar", part, first, options.image_size)
            bar.update(len(part))


if __name__ == "__main__":
    main()
