"""`name=NAME`: models that are not named by themselves are those of runs/NAME."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle1 import evaluate, reconstruct, score

# Of each command its program, arguments, the models that it takes from the run, and the file with what it used.
COMMANDS = {
    "score": (score.main, ["pictures"], {"transformer": "", "dvae": ""}, "scores.json"),
    "reconstruct": (reconstruct.main, ["pictures"], {"ckpt": ""}, "metrics.json"),
    "tokenizer": (evaluate.main, ["tokenizer", "pictures"], {"dvae": "", "extractor": "clip:"}, "evaluation.json"),
    "transformer": (evaluate.main, ["transformer", "pictures"], {"transformer": "", "dvae": ""}, "evaluation.json"),
    "system": (
        evaluate.main,
        ["system", "pictures", "candidates=2"],
        {"transformer": "", "dvae": "", "extractor": "clip:", "reranker": "clip:"},
        "evaluation.json",
    ),
    "overlap": (
        evaluate.main,
        ["overlap", "train=pictures", "val=pictures"],
        {"extractor": "clip:"},
        "evaluation.json",
    ),
}
STAGES = {"ckpt": "dvae", "extractor": "clip", "reranker": "clip"}  # of options that are not called after theirs


@pytest.fixture
def directory(run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three captioned pictures, and a run called mine; none has the name that is the default."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run_directory / "runs" / "shapes")
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"a red circle {i}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *words, "device=cpu"])
    main()


@pytest.mark.parametrize("command", COMMANDS)
def test_name_stands_for_the_models_of_its_run(
    command: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments, kinds, file = COMMANDS[command]
    models = {
        option: f"{kind}runs/mine/{STAGES.get(option, option)}/checkpoints/last.ckpt" for option, kind in kinds.items()
    }
    call(monkeypatch, main, *arguments, "name=mine", "out=result")
    settings = json.loads((directory / "result" / file).read_text())["settings"]
    used = {option: settings[option][0] if option == "extractor" else settings[option] for option in models}
    assert used == models
    # What is named by itself counts; all else is of the default run, which is not there.
    for left_out in models:
        given = [f"{option}={place}" for option, place in models.items() if option != left_out]
        with pytest.raises(SystemExit):
            call(monkeypatch, main, *arguments, *given, "out=other")
        error = capsys.readouterr().err.splitlines()[-1].lower()
        assert error.startswith(f"error: no {STAGES.get(left_out, left_out)} at 'runs/shapes/")
