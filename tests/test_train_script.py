"""train.py as users call it: stages, sweeps, and one clear sentence for every mistake."""

from __future__ import annotations

import csv
import json
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import SCRIPT, call, srun, torchrun
from wandb_files import OfflineRun

from dalle1.checkpoint import load_dvae, load_transformer, read_checkpoint, weights_sha256
from dalle1.data.dataset import PairDataset
from dalle1.data.preparation import Preparation, collate
from dalle1.data.shards import ShardIndex
from dalle1.data.transforms import to_unit_interval
from dalle1.evaluation.codebook_usage import codebook_usage
from dalle1.evaluation.image_quality import psnr_db, squared_error
from dalle1.training.sweep_record import SweepRecord

TINY = (
    *("image_size=16", "grid_size=2", "image_vocab_size=16", "text_vocab_size=300", "text_seq_len=64"),
    *("data.recipe.image_size=16", "data.recipe.train_samples=24", "data.recipe.val_samples=4"),
    *("data.recipe.test_samples=4", "trainer.accelerator=cpu"),
)
TINY_DVAE = (
    *("stage=dvae", "model.patch_size=8", "model.n_hid=16", "model.n_init=16", "optim.max_steps=2"),
    *("optim.batch_size=4", "optim.warmup_steps=1", "optim.codebook_start_step=0"),
)


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the script in this process, demands that it fails and leaves nothing, and returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert stopped.value.code in (1, 2)
        (line,) = capfd.readouterr().err.splitlines()
        assert not list(tmp_path.iterdir())
        return line

    return run


def test_stages_and_a_sweep_write_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = call(tmp_path, "stage=tokenizer", *TINY)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "shapes" / "tokenizer" / "tokenizer.json").is_file()

    done = call(tmp_path, "-m", *TINY_DVAE, *TINY, "optim.lr=1e-3,2e-3", "logger=wandb")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    for number, job in SweepRecord(sweep).jobs().items():
        directory = sweep / str(number)
        summary = json.loads((directory / "summary.json").read_text())
        assert (summary["step"], job.status, job.value) == (2, "finished", summary["nats_per_dim"])
        assert (directory / "checkpoints" / "last.ckpt").is_file()

    # In Weights & Biases they are two runs of one group.
    logged = [OfflineRun(path) for path in sorted(sweep.glob("*/wandb/offline-run-*"))]
    assert [(run.group, run.job_type) for run in logged] == [(sweep.name, "dvae")] * 2
    assert [run.name for run in logged] == ["shapes-dvae-0", "shapes-dvae-1"]
    assert [run.config["optim"]["lr"] for run in logged] == [1e-3, 2e-3]
    assert logged[0].id != logged[1].id


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    # With a codebook start: both ranks must agree on it, and until then the codebook has no gradient.
    start = ["optim.max_steps=4", "optim.codebook_start_step=2", "optim.codebook_start_pictures=16"]
    # An odd number of pictures: means over ranks must weigh them.
    start += ["data.recipe.val_samples=5"]
    done = call(tmp_path, *TINY_DVAE, *TINY, *start, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "shapes" / "dvae"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 4

    dvae = load_dvae(run / "checkpoints" / "last.ckpt").model
    pictures = PairDataset(ShardIndex(f"{tmp_path}/data/shapes/val-*.tar"), Preparation(image_size=16))
    image = to_unit_interval(collate([pictures[i] for i in range(len(pictures))])["pixels"])
    tokens = dvae.encode(image)
    error = squared_error(dvae.decode(tokens), image)
    usage = codebook_usage(torch.bincount(tokens.flatten(), minlength=16))
    assert len(image) == 5
    # Batches of other sizes are summed in another order.
    assert summary["mse"] == pytest.approx(float(error.mean()), rel=1e-4)
    assert summary["psnr_db"] == pytest.approx(float(psnr_db(error).mean()), rel=1e-4)
    assert summary["code_perplexity"] == pytest.approx(usage.perplexity, rel=1e-4)
    assert summary["dead_codes"] == usage.n_dead


def test_run_of_two_processes_that_a_signal_stops_goes_on_under_other_launchers_as_if_nothing_had_been(
    tmp_path: Path,
) -> None:
    options = [*TINY_DVAE, *TINY, "optim.max_steps=6", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    kill = ["+callbacks.kill._target_=killing.KillAt", "+callbacks.kill.step=2", "+callbacks.kill.rank=1"]
    stopped, whole = [*options, f"run_dir={tmp_path / 'stopped'}"], [*options, f"run_dir={tmp_path / 'whole'}"]

    # A signal to one of them stops both.
    done = call(tmp_path, *stopped, *kill)
    assert done.returncode == 0, done.stderr
    assert "SIGTERM has stopped 'stopped' after update 3, which is saved" in done.stdout

    # One process with other options, as on a node where somebody has mistyped them, is refused by all.
    refused = srun(tmp_path, stopped, [*stopped, "trainer.val_check_interval=7"])
    assert refused.returncode == 1
    assert "process 1 has another trainer.val_check_interval (7, not 1000)" in refused.stderr

    done = srun(tmp_path, stopped, stopped)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuing 'stopped' from step 3") == 1
    done = torchrun(tmp_path, *whole)
    assert done.returncode == 0, done.stderr

    of_stopped, of_whole = (
        read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("stopped", "whole")
    )
    assert of_stopped["global_step"] == of_whole["global_step"] == 6
    for part in ("state_dict", "ema"):
        assert weights_sha256(of_stopped[part]) == weights_sha256(of_whole[part])


def test_process_that_dies_ends_its_job_of_a_sweep_and_not_the_sweep(tmp_path: Path) -> None:
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    kill = ["+callbacks.kill._target_=killing.KillAt", "+callbacks.kill.step=1,9", "+callbacks.kill.rank=1"]
    done = call(tmp_path, "-m", *TINY_DVAE, *TINY, *two, *kill, f"+callbacks.kill.number={int(signal.SIGKILL)}")
    assert done.returncode == 1
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert "error: all ranks must go on together, rank 1 has ended by SIGKILL; what it has said is above" in done.stderr
    jobs = SweepRecord(sweep).jobs()
    assert (jobs[0].status, jobs[1].status) == ("failed", "finished")
    assert f"all jobs of a sweep must end well, 1 of 2 have not: 0 in '{sweep.relative_to(tmp_path)}'" in done.stderr
    assert not (sweep / "0" / "summary.json").exists()
    assert json.loads((sweep / "1" / "summary.json").read_text())["step"] == 2


def test_rank_that_stops_answering_is_named_and_ends_the_run(tmp_path: Path) -> None:
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "callbacks.hang_watch.timeout_minutes=0.05"]
    stop = ["+callbacks.kill._target_=killing.KillAt", "+callbacks.kill.step=1", "+callbacks.kill.rank=1"]
    done = call(tmp_path, *TINY_DVAE, *TINY, *two, *stop, f"+callbacks.kill.number={int(signal.SIGSTOP)}")
    assert done.returncode == 1
    assert "minutes: the others wait for rank 1 (on " in done.stderr
    assert "), which says nothing any more; the last that it said is that it " in done.stderr


def test_sweep_of_processes_that_somebody_else_has_started_is_refused(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "a sweep must be one process, got several from torchrun or srun" in fails("-m", "stage=dvae", "seed=1,2")


def test_processes_that_somebody_else_has_started_must_be_as_many_as_the_options_say(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    line = fails("stage=dvae", "trainer=ddp", "trainer.devices=2")
    assert "trainer.devices * trainer.num_nodes must be the 3 processes that were started, got 2 * 1" in line


@pytest.mark.slow
def test_transformer_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    for arguments in (["stage=tokenizer"], TINY_DVAE):
        done = call(tmp_path, *arguments, *TINY)
        assert done.returncode == 0, done.stderr
    options = ["model.d_model=16", "model.n_heads=2", "optim.max_steps=6", "optim.warmup_steps=1"]
    # Halves the rate after every second update, on both ranks or they part.
    options += ["optim.lr_schedule=plateau", "optim.plateau_window=1", "optim.plateau_patience=1"]
    options += ["optim.plateau_threshold=0.5", "optim.resblock_gradient_scaling=true", "trainer.log_every_n_steps=1"]
    # Without it Adam makes as much of a gradient's rounding error as of a gradient.
    options += ["optim.eps=1e-2"]
    runs = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        split = ["trainer=ddp", f"trainer.devices={processes}", f"optim.batch_size={4 // processes}"]
        done = call(tmp_path, "stage=transformer", *TINY, *split, "trainer.accelerator=cpu", *options, f"run_dir={run}")
        assert done.returncode == 0, done.stderr
        with next(run.glob("logs/*/metrics.csv")).open() as file:
            rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]
        runs[processes] = rates, load_transformer(run / "checkpoints" / "last.ckpt").model.state_dict()
    (rates, weights), (rates_of_two, weights_of_two) = runs[1], runs[2]
    assert len(set(rates)) > 2
    assert rates_of_two == rates
    for name, weight in weights.items():
        torch.testing.assert_close(
            weights_of_two[name], weight, rtol=1e-3, atol=1e-5, msg=lambda why, name=name: f"{name}: {why}"
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["stage", "tokenizer", "dvae", "clip", "transformer"]),
        (["stage=dvea"], ["dvea", "dvae"]),
        (["stage=dvae", "experiment=shaeps"], ["shaeps"]),
        (["stage=dvae", "trainer=tpus"], ["trainer", "tpus", "cpu"]),
        (["stage=transformer", "model=dvae_shapes"], ["TransformerConfig", "DVAEConfig"]),
        (["stage=dvae", "optim.lrr=1"], ["optim.lrr"]),
        (["stage=dvae", "optim.lr=fast"], ["lr", "fast"]),
        (["stage=dvae", "--lr=1"], ["without dashes"]),
        (["stage=dvae", "data.recipe=null", "data.train=none-*.tar", "data.val=none-*.tar"], ["none-*.tar"]),
        (["stage=dvae", "experiment=emoji"], ["data.train must be given, as data.train=..."]),
        (["stage=dvae", "data.background=#20a0fg"], ["must be a name", "got '#20a0fg'"]),
        (["stage=dvae", "optim.codebook_start_step=1", "model.n_init=8"], ["n_init", "8"]),
    ],
)
def test_mistake_gets_one_sentence_and_leaves_nothing(
    fails: Callable[..., str], arguments: list[str], words: list[str]
) -> None:
    line = fails(*arguments)
    for word in words:
        assert word in line


@pytest.mark.parametrize("stage", ["clip", "transformer"])
def test_missing_result_of_an_earlier_stage_is_named(fails: Callable[..., str], stage: str) -> None:
    fits = ["model.patch_size=8"] if stage == "clip" else []
    assert "run 'python train.py stage=tokenizer' first" in fails(f"stage={stage}", *TINY, *fits)
