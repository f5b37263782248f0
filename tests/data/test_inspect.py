"""`python -m dalle1.data.inspect`: what it prints and writes, and what it says of mistakes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_files import serve
from hydra import compose, initialize_config_dir
from PIL import Image

from dalle1.cli import OptionError
from dalle1.data.filters import FilterConfig
from dalle1.data.inspect import inspect_data, main, split_arguments
from dalle1.data.survey import SurveyOptions

ROOT = Path(__file__).resolve().parents[2]
Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]
MakeSamples = Callable[..., Members]
Encode = Callable[..., bytes]


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def look(places: list[str], *overrides: str) -> dict[str, Any]:
    """What the command writes into `out`."""
    cfg = compose("inspect", [f"out={places[0]}-seen", "num_workers=0", *overrides])
    inspect_data(cfg, places)
    report: dict[str, Any] = json.loads(Path(cfg.out, "report.json").read_text())
    return report


@pytest.fixture
def shard(write_shard: WriteShard, make_samples: MakeSamples) -> str:
    return write_shard("a.tar", [*make_samples(6), ("bad.png", b"broken"), ("bad.txt", b"no picture")])


def test_configuration_has_the_defaults_of_its_options() -> None:
    cfg = compose("inspect")
    options = SurveyOptions()
    for name in ("decode", "samples", "seed", "image_size"):
        assert cfg[name] == getattr(options, name)
    assert cfg.caption == options.caption.setting
    assert dict(cfg.filters).keys() - {"_target_"} == FilterConfig().to_dict().keys()


def test_command_needs_nothing_but_the_configuration(tmp_path: Path, shard: str) -> None:
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dalle1.data.inspect", "filters.min_side=9", "a.tar", "samples=2", "decode=null"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("7 samples in 1 shard\n")
    assert "filters keep 0 of 7 samples (0.0%)" in done.stdout
    out = tmp_path / done.stdout.splitlines()[-1].removeprefix("files: ")
    assert out.parent == tmp_path / "runs" / "inspect"
    assert out.name.startswith("a-")
    assert names(out) == {"report.json", "histograms.png", "samples.png", "dropped.png"}
    assert names(tmp_path) == {"conf", "a.tar", "runs"}


def test_pictures_and_numbers_are_written(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = look([shard], "filters=paper", "filters.min_side=8", "filters.language=null", "samples=4")
    out = Path(f"{shard}-seen")
    assert names(out) == {"report.json", "histograms.png", "samples.png", "dropped.png"}
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 300
    assert report["places"] == [shard]
    assert report["settings"]["filters"] == {
        "min_side": 8,
        "max_aspect": 2,
        "min_caption_words": 3,
        "min_caption_characters": 6,
        "boilerplate": True,
    }
    assert {reason: found["samples"] for reason, found in report["dropped_by_filters"].items()} == {
        "caption below 3 words": 6,
        "picture unreadable": 1,
    }
    printed = capsys.readouterr().out
    assert "caption below 3 words" in printed
    assert printed.endswith(f"files: {out}\n")


def test_near_duplicates_at_no_distance_are_a_filter(
    write_shard: WriteShard, make_samples: MakeSamples, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = make_samples(1)[0][1]
    shard = write_shard("twice.tar", [("a.png", picture), ("b.png", picture)])
    report = look([shard], "filters.near_duplicates=0")
    assert report["settings"]["filters"] == {"near_duplicates": 0}
    assert "filters keep 1 of 2 samples" in capsys.readouterr().out


def test_shards_elsewhere_and_a_local_one(shard: str) -> None:
    with serve(Path(shard).parent) as (address, _):
        report = look([f"{address}/a.tar", shard], f"out={shard}-seen")
    assert list(report["containers"]) == [f"{address}/a.tar", shard]
    assert names(Path(f"{shard}-seen")) == {"report.json", "histograms.png", "samples.png"}


def test_bad_picture_is_a_sentence_on_the_page(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dalle1.data import survey_pictures

    written: list[str] = []
    write = survey_pictures._write
    monkeypatch.setattr(
        survey_pictures,
        "_write",
        lambda pen, place, text, *rest: written.append(text) or write(pen, place, text, *rest),
    )
    look([shard])
    assert "it is not a JPEG, PNG or WebP file" in written
    assert {"no picture", "number 3", "12 x 8, 000003"} <= set(written)


def test_nothing_that_can_be_shown_is_no_error(write_shard: WriteShard) -> None:
    shard = write_shard("a.tar", [("1.json", b"{}")])
    report = look([shard], "samples=0")
    assert names(Path(f"{shard}-seen")) == {"report.json"}
    assert report["bad_samples"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tar", "there are none in .*; shard '.*b.tar' is not a readable, uncompressed tar file .*; replace it"),
        (None, "there are none in .*|no shards match"),
        (bytes(10240), "shards must hold samples, such as 01.jpg and 01.txt; there are none in"),
    ],
)
def test_nothing_readable_is_an_error_with_its_reason(tmp_path: Path, content: bytes | None, message: str) -> None:
    shard = tmp_path / "b.tar"
    if content is not None:
        shard.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        look([str(shard)])
    with (
        serve(tmp_path) as (address, _),
        pytest.raises(ValueError, match=r"there are none in 'http://.*/b\.tar'"),
    ):
        look([f"{address}/b.tar"], f"out={tmp_path}/seen")
    assert names(tmp_path) <= {"b.tar"}


@pytest.mark.parametrize(
    ("places", "overrides", "error", "message"),
    [
        ([], [], OptionError, "shards must be named, as in python -m"),
        (["a.tar"], ["out=."], FileExistsError, r"out must not exist yet or be an empty directory, got '\.'"),
        (["a.tar"], ["num_workers=-1"], ValueError, "num_workers must be >= 0, got -1"),
        (["a.tar"], ["decode=true"], TypeError, "decode must be an integer >= 0, got True"),
        (["a.tar"], ["caption=title"], ValueError, "caption must be text, lines or json:FIELD, got 'title'"),
        (["a.tar"], ["allow_pipe=1"], TypeError, "allow_pipe must be true or false, got 1"),
        (["pipe:cat a.tar"], [], ValueError, "a command is only run with allow_pipe=true, got 'pipe:cat a.tar'"),
        (["folder"], [], ValueError, r"shards must be tar files, got directory 'folder'; write 'folder/\*\.tar'"),
        (["folder/list.csv"], [], ValueError, "line 2 of table 'folder/list.csv' must have a path"),
        (["folder/list.csv", "a.tar"], [], ValueError, "line 2 of table 'folder/list.csv' must have a path"),
    ],
)
def test_mistakes_get_one_sentence(
    places: list[str],
    overrides: list[str],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    write_shard: WriteShard,
    make_samples: MakeSamples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "list.csv").write_text("path\n,\n")
    write_shard("a.tar", make_samples(1))
    write_shard("folder/a.tar", make_samples(1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        inspect_data(compose("inspect", overrides), places)
    assert names(tmp_path) == {"a.tar", "folder"}


def test_command_that_writes_a_tar_is_run_if_allowed(shard: str) -> None:
    assert look([f"pipe:cat {shard}"], "allow_pipe=true", f"out={shard}-seen")["samples"] == 7


def test_paths_and_options_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=1").mkdir()
    for name in ("seed=1/a.tar", "decode=2.tar"):
        (tmp_path / name).touch()
    paths = ["a.tar", "b-{0..3}.tar", "seed=1/a.tar", "seed=1/*.tar", "decode=2.tar", "data/epoch=3/a.tar"]
    paths += ["https://host/a.tar?key=value", "pipe:cat a=b.tar", "pictures/"]
    options = [
        "decode=2",
        "filters=paper",
        "filters.json={NSFW: no}",
        "+filters.json.b.max=1",
        "hydra/job_logging=none",
    ]
    options += ["hydra.verbose=true", "unknown=3", "--help", "--cfg", "job"]
    assert split_arguments([*paths, *options]) == (paths, options)
    assert split_arguments(["filters=paper", "a.tar", "--cfg", "job", "b.tar"]) == (
        ["a.tar", "b.tar"],
        ["filters=paper", "--cfg", "job"],
    )


def test_elsewhere_it_says_where_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main()
    expected = f"error: no configuration in '{tmp_path / 'conf'}'; run this in the directory of train.py\n"
    assert capsys.readouterr() == ("", expected)


def test_what_the_terminal_cannot_show_is_escaped(
    write_shard: WriteShard, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard("a.tar", [*make_samples(1), ("ü.txt", "日本".encode())])
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    look([shard])
    printed.flush()
    assert rb"\u65e5\u672c" in printed.buffer.getvalue()  # type: ignore[attr-defined]
