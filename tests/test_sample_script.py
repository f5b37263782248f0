"""sample.py as users call it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle1.checkpoint import Loaded, load_clip, load_dvae, load_transformer, make_record, write_exported

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "sample.py"
NASTY = """it's "a", (b) = ${x}; #1 🐉"""


def _call(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def work(tmp_path: Path, run_directory: Path) -> Path:
    """A directory to run in, with the checkpoints of all stages."""
    for stage in ("transformer", "dvae", "clip"):
        directory = tmp_path / "runs" / "shapes" / stage
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.symlink_to(run_directory / "runs" / "shapes" / stage)
    return tmp_path


@pytest.fixture
def sample(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls the script's main part in this process; starting Python and importing torch takes seconds."""
    spec = importlib.util.spec_from_file_location("sample", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(work)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        module.main()

    return call


def test_script_samples_any_prompt_and_says_where_the_pictures_are(work: Path) -> None:
    done = _call(work, f"prompt={NASTY}", "candidates=3")
    assert (done.returncode, done.stderr) == (0, "")
    first, grid, manifest = done.stdout.splitlines()
    assert first.startswith("3 pictures, best score ")
    (directory,) = (work / "runs" / "shapes" / "samples").iterdir()
    assert directory.name.startswith("it-s-a-b-x-1-20")
    assert work / grid.removeprefix("grid:").strip() == directory / "grid.png"
    content = json.loads((work / manifest.removeprefix("manifest:").strip()).read_text(encoding="utf-8"))
    assert content["settings"]["prompt"] == content["prompts"][0]["prompt"] == NASTY
    scores = [picture["score"] for picture in content["prompts"][0]["pictures"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(path.name for path in work.iterdir()) == ["runs"], "Hydra leaves nothing behind"


def test_script_without_checkpoints_says_what_to_train(tmp_path: Path) -> None:
    done = _call(tmp_path, "prompt=a", "rerank=none", "name=new")
    assert done.returncode == 1
    assert done.stdout == ""
    expected = "error: no dvae at 'runs/new/dvae/checkpoints/last.ckpt'; train it (stage=dvae) or correct the path\n"
    assert done.stderr == expected


def test_same_seed_gives_the_same_files_and_another_seed_others(work: Path, sample: Callable[..., None]) -> None:
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        sample("prompt=a red circle", "candidates=2", f"seed={seed}", f"out={out}")
    names = ["0001-a-red-circle-001.png", "0001-a-red-circle-002.png", "grid.png"]
    for name in names:
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes()
        assert (work / "one" / name).read_bytes() != (work / "three" / name).read_bytes()


def test_prompts_file_without_ranking(work: Path, sample: Callable[..., None]) -> None:
    (work / "my prompts, (1).txt").write_text("a red circle\n\n日本\n", encoding="utf-8")
    sample("prompts_file=my prompts, (1).txt", "candidates=2", "rerank=none", "batch_size=3", "out=my = out")
    content = json.loads((work / "my = out" / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["prompt"] for entry in content["prompts"]] == ["a red circle", "日本"]
    assert [picture["score"] for picture in content["prompts"][0]["pictures"]] == [None, None]
    assert "clip" not in content["checkpoints"]
    with Image.open(work / "my = out" / "grid.png") as grid:
        assert grid.width == 384


def test_temperatures_of_rows_are_in_the_manifest(work: Path, sample: Callable[..., None]) -> None:
    sample("prompt=a", "candidates=2", "rerank=none", "temperature=[1,0.5,0]", "out=rows")
    settings = json.loads((work / "rows" / "manifest.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["temperature"], settings["temperature_end"]) == ([1, 0.5, 0], None)


def test_exported_checkpoints_give_the_same_pictures(work: Path, sample: Callable[..., None]) -> None:
    stages = {"transformer": load_transformer, "dvae": load_dvae, "clip": load_clip}
    for stage, load in stages.items():
        loaded: Loaded[Any] = load(work / "runs" / "shapes" / stage / "checkpoints" / "last.ckpt")
        record = make_record(loaded.model, text_tokenizer=loaded.text_tokenizer, dvae_sha256=loaded.dvae_sha256)
        write_exported(work / "my exported" / stage, loaded.model, record, step=loaded.step)
    sample("prompt=a red circle", "candidates=2", "out=one")
    sample("prompt=a red circle", "candidates=2", "out=two", *(f"{stage}=my exported/{stage}" for stage in stages))
    for name in ("0001-a-red-circle-001.png", "0001-a-red-circle-002.png"):
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either prompt=... or prompts_file=..., got neither"),
        (["prompt="], "prompt must not be empty"),
        (["prompt=" + "z" * 41], "prompt must have at most 40 tokens, as the transformer was trained with, got 41"),
        (["prompt=a", "candidates=0"], "candidates must be >= 1, got 0"),
        (["prompt=a", "candidates=many"], "candidates must be an integer >= 1, got 'many'"),
        (["prompt=a", "temperature=-1"], "temperature must be a finite number >= 0 (0 is greedy), got -1"),
        (["prompt=a", "temperature=[1,2]"], "temperature must be one number or one for each of 3 rows, got 2"),
        (["prompt=a", "temperature=hot"], "SamplingConfig.temperature must be a number, got 'hot'"),
        (["prompt=a", "negative_prompt=b"], "a negative prompt needs a guidance_scale other than 1, got 1"),
        (["prompt=a", "guidance_scale=2"], "guidance needs a transformer trained with optim.caption_dropout > 0"),
        (["prompt=a", "rerank=best"], "rerank must be clip or none, got 'best'"),
        (
            ["prompt=a", "clip=nothing.ckpt"],
            "no CLIP at 'nothing.ckpt'; train it (stage=clip), or do without ranking: rerank=none",
        ),
        (["prompt=a", "out=runs"], "out must not exist yet or be an empty directory, got 'runs'"),
        (["prompt=a", "dvae=${clip}"], "must hold a dvae, got a clip"),
        (["prompt=a", "device=toaster"], "device must be auto or one that PyTorch can use here, got 'toaster'"),
        (["prompt=a", "candidate=3"], "there is no option 'candidate'; did you mean 'candidates'?"),
        (["prompts_file=nothing.txt"], "there is none at 'nothing.txt'"),
    ],
)
def test_mistake_is_one_line(
    sample: Callable[..., None], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        sample(*arguments)
    assert raised.value.code in (1, 2)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


def test_help_names_the_options(sample: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        sample("--help")
    assert raised.value.code == 0
    output = capsys.readouterr().out
    assert 'python sample.py prompt="a red circle above a blue square"' in output
    assert "candidates: 16" in output
