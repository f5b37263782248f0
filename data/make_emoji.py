"""Make shards of colour emoji from the Noto Color Emoji pictures and Unicode's names (see data/README.md)."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dalle1.atomic_files import atomic
from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.data.shard_writer import EncodedPicture, write_shard
from dalle1.data.transforms import decode_image

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


def read_emoji(path: Path, name: str, side: int) -> EncodedPicture:
    """A picture as JPEG on white, side x side pixels, with its name as caption.

    Raises: ValueError if it cannot be decoded."""
    try:
        picture = decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' must be a picture, but {error}; get it again") from error
    file = io.BytesIO()
    picture.resize((side, side), Image.Resampling.LANCZOS).save(file, "jpeg", quality=95)
    return EncodedPicture(extension="jpg", data=file.getvalue(), width=side, height=side, caption=name)


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
            pictures = (read_emoji(path, name, options.image_size) for path, name in part)
            with atomic(options.out / f"emoji-{number:05d}.tar") as temporary:
                bar.update(write_shard(temporary, pictures, first=first))


if __name__ == "__main__":
    main()
