"""The nearest training picture of each validation picture: exact, and planted duplicates are found."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dalle1.evaluate import main
from dalle1.evaluation.extractors import Features
from dalle1.evaluation.feature_sets import extract
from dalle1.evaluation.nearest import nearest
from dalle1.evaluation.overlap_command import Overlap, find_nearest, shown_pairs
from dalle1.evaluation.overlap_page import counts_at_or_above, slider_steps
from dalle1.evaluation.picture_sets import Treatment, open_pictures
from dalle1.evaluation.ranks import Ranks

CPU = torch.device("cpu")
NASTY = "</script><script>alert(1)</script>\"'<img src=x onerror=alert(2)>"


@pytest.mark.parametrize("block_size", [1, 7, 64, 500])
@pytest.mark.parametrize("rows", [3, 4096])
def test_nearest_is_that_of_all_pairs(block_size: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.evaluation.nearest._ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    queries, references = (torch.randn(n, 16, generator=generator) for n in (50, 200))
    found = nearest(queries, torch.split(references, block_size))
    a, b = queries.double().numpy(), references.double().numpy()
    cosines = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    assert found.indices.tolist() == cosines.argmax(1).tolist()
    np.testing.assert_allclose(found.similarities, cosines.max(1), atol=1e-6)


def test_of_equal_references_the_first_is_taken_and_lengths_do_not_matter() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    blocks = [torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.1, 0.0]])]
    found = nearest(query, blocks)
    assert found.indices.tolist() == [1, 0]
    assert found.similarities.tolist() == [1.0, 0.0]


def test_features_that_cannot_be_compared_are_refused() -> None:
    query = torch.ones(1, 2)
    with pytest.raises(ValueError, match="at least one reference, got none"):
        nearest(query, [])
    with pytest.raises(ValueError, match="same size, got 2 of queries, 3 of references"):
        nearest(query, [torch.ones(1, 3)])
    for queries, block in ((query * torch.nan, query), (query, query * torch.inf)):
        with pytest.raises(ValueError, match="features must be finite"):
            nearest(queries, [block])


class _Colors:
    """Features that anybody can check: mean colours of 4 x 4 parts, less the picture's mean."""

    name, n_features = "colors-0", 48
    has_classes = reads_text = False
    facts: dict[str, Any] = {}  # noqa: RUF012

    def __call__(self, pictures: Sequence[Tensor]) -> Features:
        parts = torch.stack([adaptive_avg_pool2d(picture.float(), 4).flatten() for picture in pictures])
        return Features(features=parts - parts.mean(1, keepdim=True), probabilities=None)

    def to(self, device: torch.device) -> None: ...

    def text_features(self, captions: Sequence[str]) -> Tensor:
        raise AssertionError("nobody asks for captions")


def _picture(seed: int) -> Image.Image:
    """Smooth colours, 40 x 30 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC)


def _encoded(picture: Image.Image, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **how)
    return buffer.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """30 training pictures; of 12 validation pictures three are copies: exact, recoded, cropped."""
    places = {name: tmp_path / name for name in ("train", "val")}
    for name, place in places.items():
        place.mkdir()
        for number in range(30 if name == "train" else 9):
            _picture(number + (0 if name == "train" else 1000)).save(place / f"{name}-{number:02d}.png")
            (place / f"{name}-{number:02d}.txt").write_text(f"{name} {number}")
    (places["val"] / "exact.png").write_bytes((places["train"] / "train-03.png").read_bytes())
    (places["val"] / "recoded.jpg").write_bytes(_encoded(_picture(17), format="JPEG", quality=60))
    (places["val"] / "cropped.png").write_bytes(_encoded(_picture(29).crop((2, 1, 39, 29)), format="PNG"))
    (places["val"] / "exact.txt").write_text(NASTY)
    return places


@pytest.fixture
def overlap(folders: dict[str, Path], tmp_path: Path) -> Overlap:
    sets = {name: open_pictures([str(place)]) for name, place in folders.items()}
    features = {
        name: extract(each, _Colors(), Treatment(), cache=tmp_path / "cache", ranks=Ranks(), label="", chunk_size=7)
        for name, each in sets.items()
    }
    return Overlap.of("colors-0", sets["val"], sets["train"], find_nearest(features["val"], features["train"], CPU))


def test_planted_duplicates_are_the_closest_pairs(overlap: Overlap) -> None:
    pairs = overlap.to_dict(threshold=0.9)["pairs"]
    assert [(pair["val"]["key"], pair["train"]["key"]) for pair in pairs[:3]] == [
        ("exact.png", "train-03.png"),
        ("recoded.jpg", "train-17.png"),
        ("cropped.png", "train-29.png"),
    ]
    assert pairs[0]["similarity"] == 1
    assert pairs[2]["similarity"] > 0.9 > pairs[3]["similarity"]
    assert len(pairs) == 12
    assert [pair["similarity"] for pair in pairs] == sorted((pair["similarity"] for pair in pairs), reverse=True)


def test_share_and_keys_follow_the_threshold(overlap: Overlap) -> None:
    for threshold, n in ((-1.0, 12), (0.9, 3), (1.0, 1)):
        content = overlap.to_dict(threshold)
        assert content["share"] == n / 12
        assert len(content["keys"]) == n
        numbers = overlap.numbers(threshold).values
        assert numbers[f"overlap_share[colors-0,n=12/30,threshold={threshold:g}]"] == n / 12
    assert content["keys"] == ["exact.png"]
    assert numbers["similarity_quantile[colors-0,n=12/30,q=0.5]"] == pytest.approx(np.median(overlap.similarities))


def test_keys_that_stand_for_several_pictures_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    (again / "exact.png").write_bytes((folders["val"] / "val-00.png").read_bytes())
    val, train = open_pictures([str(folders["val"]), str(again)]), open_pictures([str(folders["train"])])
    how: dict[str, Any] = {"cache": tmp_path / "cache", "ranks": Ranks(), "label": ""}
    found = find_nearest(*(extract(each, _Colors(), Treatment(), **how) for each in (val, train)), CPU)
    (note,) = Overlap.of("colors-0", val, train, found).numbers(0.9).notes
    assert note.startswith("1 keys stand for several validation pictures, such as 'exact.png'")


@pytest.mark.parametrize(
    ("n", "most", "expected"),
    [(3, 200, [0, 1, 2]), (10, 4, [0, 1, 2, 9]), (100, 5, [0, 1, 2, 3, 99]), (9, 1, [0]), (4, 4, [0, 1, 2, 3])],
)
def test_page_has_the_closest_pairs_and_some_of_all_others(n: int, most: int, expected: list[int]) -> None:
    assert shown_pairs(n, most) == expected
    many = shown_pairs(1000, 200)
    assert many[:100] == list(range(100))
    assert len(set(many)) == 200
    assert many[-1] == 999


def test_slider_has_the_similarities_that_occur_and_their_counts() -> None:
    similarities = np.array([1.0, 0.75, 0.5, 0.5, -0.25])
    thresholds = slider_steps(similarities, 0.6)
    assert thresholds == [-0.25, 0.5, 0.6, 0.75, 1.0]
    assert counts_at_or_above(similarities, thresholds) == [5, 4, 2, 2, 1]
    many = np.linspace(1, 0.9999, 50_000)
    steps = slider_steps(many, 0.95)
    assert len(steps) == 1001
    shares = np.array(counts_at_or_above(many, steps[1:])) / 50_000
    np.testing.assert_allclose(np.diff(shares), -1 / 999, atol=1e-4)


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def call(
    folders: dict[str, Path], tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Runs the command with our CLIP and returns the directory that it has written."""

    def run(*arguments: str, out: str = "out") -> Path:
        sets = [f"{name}={place}" for name, place in folders.items()]
        fixed = [f"extractor=clip:{checkpoints['clip']}", f"cache={tmp_path / 'cache'}", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["evaluate", "overlap", *sets, *fixed, f"out={tmp_path / out}", *arguments])
        main()
        return tmp_path / out

    return run


def test_command_writes_pairs_page_and_numbers(
    call: Callable[..., Path], capsys: pytest.CaptureFixture[str], folders: dict[str, Path]
) -> None:
    out = call("threshold=1", "pairs=4")
    content = json.loads((out / "overlap.json").read_text())
    assert content["keys"] == ["exact.png"]
    assert content["pairs"][0]["val"] == {"key": "exact.png", "container": str(folders["val"])}
    assert content["pairs"][0]["train"]["key"] == "train-03.png"
    numbers = json.loads((out / "evaluation.json").read_text())["numbers"]
    (share,) = [value for name, value in numbers.items() if name.startswith("overlap_share[clip-")]
    assert share == content["share"] == 1 / 12
    assert f"{1 / 12:.6g}" in capsys.readouterr().out

    elements = _Elements((out / "overlap.html").read_text())
    assert len(elements.all("article")) == 4
    assert elements.all("article")[0]["data-similarity"] == "1.0"
    pictures = elements.all("img")
    assert len(pictures) == 8
    assert all((picture["src"] or "").startswith("data:image/webp;base64,") for picture in pictures)
    assert pictures[0]["alt"] == NASTY, "a caption is text, whatever it says"
    assert len(elements.all("script")) == 2
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    # What --without of the evaluation of samples reads.
    assert open_pictures([str(folders["val"])]).rows_without(content["keys"]) == [
        i for i, sample in enumerate(open_pictures([str(folders["val"])]).samples) if sample.key != "exact.png"
    ]


def test_interrupted_command_leaves_no_directory_and_goes_on(
    call: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dalle1.evaluation.overlap_command.thumbnail", interrupted)
        with pytest.raises(SystemExit):
            call()
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in call().iterdir()) == ["evaluation.json", "overlap.html", "overlap.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["threshold=1.5"], "threshold must be a cosine in [-1, 1], got 1.5"),
        (["threshold=nan"], "threshold must be a cosine in [-1, 1], got nan"),
        (["pairs=0"], "pairs must be >= 1, got 0"),
    ],
)
def test_mistake_gets_one_sentence(
    call: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {message}"
    assert not (tmp_path / "out").exists()


def test_two_extractors_are_refused(
    call: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, make_clip: Callable[..., Any],
    write_checkpoint: Callable[..., Path], text_tokenizer: Any,
) -> None:  # fmt: skip
    other = write_checkpoint(tmp_path / "other.ckpt", make_clip(seed=5), text_tokenizer=text_tokenizer)
    with pytest.raises(SystemExit):
        call(f"extractor=clip:{other}")
    assert "overlap needs one extractor, got 2; give one" in capsys.readouterr().err
