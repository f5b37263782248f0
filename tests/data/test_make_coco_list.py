"""The list of COCO's pictures, from a file of captions as COCO writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CONTENT = {
    "info": {"description": "COCO 2017 Dataset"},
    "licenses": [
        {"url": "http://a/by/2.0/", "id": 4, "name": "A"},
        {"url": "http://a/by-nc/2.0/", "id": 2, "name": "B"},
    ],
    "images": [
        {"id": 7, "license": 4, "file_name": "007.jpg", "coco_url": "http://coco/007.jpg", "height": 427, "width": 640},
        {"id": 5, "license": 2, "file_name": "005.jpg", "coco_url": "http://coco/005.jpg", "height": 427, "width": 640},
        {"id": 6, "license": 2, "file_name": "006.jpg", "coco_url": "http://coco/006.jpg", "height": 427, "width": 640},
    ],
    "annotations": [
        {"image_id": 5, "id": 1, "caption": "A bicycle."},
        {"image_id": 7, "id": 2, "caption": "A room with\nblue walls. "},
        {"image_id": 5, "id": 3, "caption": 'Two wheels, "parked" in a café'},
        {"image_id": 6, "id": 4, "caption": " \n"},
    ],
}


@pytest.fixture(scope="module")
def script(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    """The script as a module."""
    return load_recipe("make_coco_list")


def make(script: ModuleType, directory: Path, content: Any) -> Path:
    captions, out = directory / "captions.json", directory / "new" / "coco.jsonl"
    captions.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    script.main(["--captions", str(captions), "--out", str(out)])
    return out


def test_each_captioned_picture_is_one_row_with_all_its_captions(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in make(script, tmp_path, CONTENT).read_text().splitlines()]
    room, bicycle = rows
    assert room == {
        "url": "http://coco/007.jpg",
        "caption": "A room with blue walls.",
        "captions": ["A room with blue walls."],
        "image_id": 7,
        "license": "http://a/by/2.0/",
    }
    assert bicycle["caption"] == "A bicycle."
    assert bicycle["captions"] == ["A bicycle.", 'Two wheels, "parked" in a café']
    assert "lists 2 pictures with 3 captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>", "must be COCO's captions_train2017.json or its like, but Expecting value"),
        ([], "must be COCO's captions_train2017.json or its like, but list indices"),
        ({"images": []}, "or its like, but it has no 'annotations'"),
        # instances_train2017.json, from the same archive
        (CONTENT | {"annotations": [{"image_id": 5, "id": 1, "bbox": []}]}, "or its like, but it has no 'caption'"),
        (CONTENT | {"annotations": [{"image_id": 5, "caption": None}]}, "or its like, but 'NoneType' object"),
        (CONTENT | {"annotations": []}, "or its like, got no captioned picture"),
    ],
)
def test_another_file_gets_one_sentence_and_leaves_no_list(
    script: ModuleType, tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make(script, tmp_path, content)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_missing_file_gets_one_sentence(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--captions", str(tmp_path / "nothing"), "--out", str(tmp_path / "list.jsonl")])
    assert "No such file" in capsys.readouterr().err
