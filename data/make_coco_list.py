"""Make the list of COCO's pictures, with all captions of each, that img2dataset downloads (see data/README.md)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dalle1.atomic_files import atomic
from dalle1.cli import errors_in_one_line


def read_pictures(path: Path) -> list[dict[str, Any]]:
    """One row for each captioned picture, in the file's order.

    A row has `url`, `caption` (the first one), `captions` (all of them), `image_id` and `license` (the address of its
    text). White space in captions, line breaks included, becomes single spaces.

    Raises: FileNotFoundError if there is no such file; ValueError if it is not one of COCO's files of captions."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        captions: dict[int, list[str]] = {}
        for annotation in content["annotations"]:
            if caption := " ".join(annotation["caption"].split()):
                captions.setdefault(annotation["image_id"], []).append(caption)
        licenses = {terms["id"]: terms["url"] for terms in content["licenses"]}
        rows = [
            {
                "url": image["coco_url"],
                "caption": captions[image["id"]][0],
                "captions": captions[image["id"]],
                "image_id": image["id"],
                "license": licenses[image["license"]],
            }
            for image in content["images"]
            if image["id"] in captions
        ]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"'{path}' must be COCO's captions_train2017.json or its like, but {reason}") from error
    if not rows:
        raise ValueError(f"'{path}' must be COCO's captions_train2017.json or its like, got no captioned picture")
    return rows


@errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Write the list, one JSON object a line; a file of that name is replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--captions", type=Path, required=True, help="captions_train2017.json, captions_val2017.json")
    parser.add_argument("--out", type=Path, required=True, help="the list, a .jsonl")
    options = parser.parse_args(arguments)
    rows = read_pictures(options.captions)
    with atomic(options.out) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    n_captions = sum(len(row["captions"]) for row in rows)
    print(f"'{options.out}' lists {len(rows):,} pictures with {n_captions:,} captions")


if __name__ == "__main__":
    main()
