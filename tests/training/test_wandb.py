"""What Weights & Biases gets of a run, read from the files that it would upload."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from PIL import Image
from stage_runs import Train
from wandb_files import OfflineRun

PROMPTS = ["a red star", "two blue circles"]
SHORT = ("optim.max_steps=2", "trainer.val_check_interval=1")


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield


@pytest.fixture(scope="module")
def results(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a dVAE and a transformer of two updates, which W&B is told of."""
    results = tmp_path_factory.mktemp("results")
    prompts = f"callbacks.pictures.prompts=[{','.join(PROMPTS)}]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        train(results, "tokenizer")
        train(results, "dvae", *SHORT, "optim.codebook_start_step=0")
        train(results, "transformer", *SHORT, "logger=wandb", "logger.wandb.group=trials", prompts)
        wandb.teardown()  # ends the process that writes the file, which may be a moment behind
    return results


@pytest.fixture(scope="module")
def offline_run(results: Path) -> OfflineRun:
    (directory,) = (results / "transformer" / "wandb").glob("offline-run-*")
    return OfflineRun(directory)


def test_run_has_its_options_group_curves_and_final_numbers(results: Path, offline_run: OfflineRun) -> None:
    assert offline_run.id == (results / "transformer" / "wandb_id").read_text()
    assert (offline_run.group, offline_run.job_type) == ("trials", "transformer")
    assert offline_run.config["optim"]["max_steps"] == 2
    curves = {name for line in offline_run.history for name in line}
    assert {"train/loss", "val/loss", "train/lr", "trainer/global_step", "val/samples/filenames"} <= curves
    summary = json.loads((results / "transformer" / "summary.json").read_text())
    assert {name: offline_run.summary[f"final/{name}"] for name in summary} == summary


def test_each_validation_has_a_table_of_the_prompts_with_their_pictures(results: Path, offline_run: OfflineRun) -> None:
    shown = [line for line in offline_run.history if "val/prompts/path" in line]
    assert [(line["val/prompts/nrows"], line["val/prompts/_type"]) for line in shown] == [(2, "table-file")] * 3
    tables = [path for name, path in offline_run.artifact_files.items() if name.endswith("prompts.table.json")]
    rows = json.loads(tables[-1].read_text())["data"]
    assert [row[:2] for row in rows] == [[2, prompt] for prompt in PROMPTS]
    for _, _, picture in rows:
        path = offline_run.artifact_files[picture["path"]]
        # Beside all else of the run, which somebody may copy to where there is a network.
        assert path.is_relative_to(results / "transformer" / "wandb")
        with Image.open(path) as file:
            assert file.size == (16, 16)


def test_same_prompts_are_in_the_run_directory_as_one_picture(results: Path) -> None:
    names = [path.name for path in sorted((results / "transformer" / "pictures").glob("samples-*"))]
    assert names == ["samples-step0000001.png", "samples-step0000002.png"]


@pytest.mark.parametrize(
    ("stage", "prompts", "message"),
    [
        ("transformer", "[]", r"prompts must be a list of texts, or null, got \[\]"),
        ("transformer", "red", "prompts must be a list of texts, or null, got red"),
        ("transformer", "[1]", r"prompts must be a list of texts, or null, got \[1\]"),
        ("transformer", f"[{'red ' * 70}]", "caption must have at most 64 tokens, got"),
        ("dvae", "[red]", "callbacks.pictures.prompts are for stage=transformer, got stage=dvae"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(
    results: Path, train: Train, stage: str, prompts: str, message: str
) -> None:
    run_dir = results / "refused"
    more = [f"callbacks.pictures.prompts={prompts}", f"run_dir={run_dir}"]
    more += ["optim.codebook_start_step=0"] if stage == "dvae" else []
    with pytest.raises(Exception, match=message):
        train(results, stage, *SHORT, *more)
    assert not run_dir.exists()


def test_without_an_account_a_run_is_offline(tmp_path: Path) -> None:
    # In a process of its own, since W&B keeps for a whole process what it was first told.
    code = (
        "from dalle1.training.logging import build_wandb_logger\n"
        f"own = build_wandb_logger(project='p', name='n', group=None, job_type='dvae', directory={str(tmp_path)!r})\n"
        "own.log_metrics({'loss': 1.0}, 1)\n"
        "own.experiment.finish()\n"
    )
    nobody = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")} | {
        "HOME": str(tmp_path / "home"),
        "NETRC": str(tmp_path / "none"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=nobody, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(directory.glob("*.wandb"))
