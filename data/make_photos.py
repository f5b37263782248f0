"""Make shards of 200 + 100 photographs from the archive of the Berkeley segmentation data set (see data/README.md)."""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from dalle1.atomic_files import atomic
from dalle1.cli import errors_in_one_line
from dalle1.data.shard_writer import EncodedPicture, write_shard

SPLITS = ("train", "val")


def read_photos(archive: Path) -> dict[str, list[EncodedPicture]]:
    """The JPEGs under `.../images/train` and `.../images/val` of the archive, as they are, by name; without captions.

    Raises: FileNotFoundError if there is no such file; ValueError if it is another, damaged or cut short.
    """
    found: dict[str, dict[str, EncodedPicture]] = {split: {} for split in SPLITS}
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc="reading", unit="file", disable=None):
                path = PurePosixPath(member.name)
                file = tar.extractfile(member) if member.isreg() else None
                if file and path.suffix == ".jpg" and path.parent.parent.name == "images" and path.parent.name in found:
                    data = file.read()
                    width, height = Image.open(io.BytesIO(data)).size
                    photo = EncodedPicture(extension="jpg", data=data, width=width, height=height, caption=None)
                    found[path.parent.name][path.name] = photo
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"'{archive}' must be the data set's .tgz, but cannot be read ({error}); get it again"
        ) from error
    if not all(found.values()):
        raise ValueError(f"'{archive}' must have pictures in images/train and images/val, got another archive")
    return {split: [photos[name] for name in sorted(photos)] for split, photos in found.items()}


@errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Write `train-00000.tar` and `val-00000.tar`; files of these names are replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="BSR_bsds500.tgz")
    parser.add_argument("--out", type=Path, default=Path("data/photos"), help="directory for the shards")
    options = parser.parse_args(arguments)
    for split, photos in read_photos(options.archive).items():
        with atomic(options.out / f"{split}-00000.tar") as temporary:
            write_shard(temporary, photos)


if __name__ == "__main__":
    main()
