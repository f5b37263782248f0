"""The command that says what training costs: its tables, its errors, and the page that shows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dalle1.models.accounting import count_flops
from dalle1.plan import main, plan, training_of
from dalle1.training.cost import Hardware, Training, count_communication, count_memory, count_seconds, largest_batch
from dalle1.training.run import build

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
SIZES = ("tiny", "small", "base", "large", "xl", "paper_2.8b", "paper_5.6b", "paper_12b")
CLUSTER = ("trainer.devices=8", "trainer.num_nodes=16", "optim.batch_size=8")


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    # Outside of a running job there is no hydra: name and run_dir are what it would give.
    return compose("plan", overrides=[*overrides, "name=test", "run_dir=unused"])


def training(*overrides: str) -> Training:
    return training_of(composed("experiment=paper", *overrides))


def _rows(text: str) -> dict[str, list[str]]:
    """Lines of the tables by their first cell."""
    cells = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    return {name: rest for name, *rest in cells}


def test_configuration_is_that_of_training() -> None:
    overrides = ["experiment=paper", "stage=transformer", "trainer=gpu", "name=test", "run_dir=unused"]
    expected = compose("train", overrides=overrides)
    cfg = composed("experiment=paper")
    assert {name: cfg[name] for name in expected} == dict(expected)
    assert set(cfg) - set(expected) == {"plan"}


def test_training_is_what_the_options_say() -> None:
    run = training(
        "trainer.devices=8", "trainer.num_nodes=16", "optim.batch_size=2", "+trainer.accumulate_grad_batches=4"
    )
    assert (run.devices, run.batch_size, run.passes, run.global_batch) == (128, 2, 4, 1024)
    assert (run.backend, run.mixed, run.has_average) == ("flex", True, True)
    run = training(
        "trainer.precision=32-true", "compute.attention_backend=local", "optim.ema_decay=0", "optim.ema_interval=1"
    )
    assert (run.backend, run.mixed, run.has_average, run.devices) == ("local", False, False, 1)
    assert training("trainer.precision=32-true", "optim.resblock_gradient_scaling=true").mixed


def test_way_to_send_is_counted() -> None:
    plain, less = (plan(composed("experiment=paper", *CLUSTER, *more)) for more in ((), ("communication=powersgd",)))
    assert "each GPU sends per update: DDP 97.6 GB" in plain
    assert "each GPU sends per update: DDP 17.9 GB" in less
    assert "not sent yet" not in _rows(plain)
    # In each of 64 layers: an error buffer for 12 matrices, and Q of 896 columns for as many rows.
    kept = 4 * 64 * (12 * 3968**2 + 12 * 3968 * 896)
    assert _rows(less)["not sent yet"][0] == f"{kept / 1e9:.1f}"


def test_tables_show_the_four_ways_and_which_of_them_fit() -> None:
    text = plan(composed("experiment=paper", "model=transformer_paper_2.8b", *CLUSTER))
    rows = _rows(text)
    assert rows["blocks"] == ["2,832,752,640", "2.8 billion"]
    assert rows["GB per GPU, batch 8"] == ["DDP", "DDP, checkpointing", "FSDP", "FSDP, checkpointing"]
    assert rows["weights"] == ["11.7", "11.7", "0.0915", "0.0915"]
    assert rows["fits into 80 GB"] == ["NO", "yes", "yes", "yes"]
    assert rows["the paper's 430,000 of 1,024"][0] == rows["430,000 updates of 1,024"][0] == "440,320,000"


def test_one_gpu_shares_with_nobody() -> None:
    text = plan(composed())
    rows = _rows(text)
    assert rows["GB per GPU, batch 8"] == ["one GPU", "one GPU, checkpointing"]
    assert not {"gathered weights", "their copies to send"} & set(rows)
    assert rows["blocks"][1] == "-"
    assert "one GPU sends nothing" in text
    assert "1 GPU at 40% of 989 teraflops" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage=dvae", "a plan must be for stage=transformer, the only one it knows, got stage=dvae"),
        (
            "trainer.devices=auto",
            "trainer.devices must be a whole number >= 1 for a plan, got auto; as in trainer.devi",
        ),
        (
            "communication=powersgd",
            "communication=powersgd must have several devices, got one; as in trainer.devices=8",
        ),
        ("trainer.num_nodes=0", "trainer.num_nodes must be a whole number >= 1 for a plan, got 0"),
        ("trainer.precision=16-mixed", "trainer.precision must be 32-true or bf16-mixed, got 16-mixed"),
        ("trainer.precision=64-true", "trainer.precision must be 32-true or bf16-mixed for a plan, got 64-true"),
        ("optim.resblock_gradient_scaling=true", "trainer.precision must be 32-true with optim.resblock_gradient_scal"),
        ("model=clip_shapes", "stage=transformer needs a TransformerConfig, got a CLIPConfig"),
        ("plan.mfu=1.5", r"plan.mfu must be in \(0, 1\], got 1.5"),
        ("plan.teraflops=many", "Hardware.teraflops must be a number, got 'many'"),
    ],
)
def test_wrong_option_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        plan(composed(override))


def test_command_needs_only_the_configuration_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dalle1.plan", "experiment=paper", *CLUSTER]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == plan(composed("experiment=paper", *CLUSTER)) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_elsewhere_it_says_where_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main()
    expected = f"error: no configuration in '{tmp_path / 'conf'}'; run this in the directory of train.py\n"
    assert capsys.readouterr() == ("", expected)


def test_page_shows_what_the_command_prints() -> None:
    shown = re.findall(r"^\$ python -m dalle1\.plan (.*)\n((?:.*\n)*?)```", PAGE, flags=re.MULTILINE)
    assert shown
    for arguments, output in shown:
        assert output.rstrip("\n") == plan(composed(*arguments.split())), arguments


@pytest.mark.parametrize("size", SIZES)
def test_page_has_the_weights_and_operations_of_every_size(size: str) -> None:
    run = training(f"model=transformer_{size}")
    model, weights, flops = run.model, run.weights, count_flops(run.model)
    cells = (
        f"`transformer_{size}`",
        f"{model.n_layers}",
        f"{model.d_model}",
        f"{model.n_heads}",
        f"{weights.blocks / 1e6:,.1f} M",
        f"{weights.total / 1e6:,.1f} M",
        f"{3 * flops.total / 1e12:.3g}",
        f"{flops.attention / flops.total:.1%}",
    )
    assert f"| {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize("size", SIZES[-4:])
def test_page_has_the_costs_of_the_papers_sizes(size: str) -> None:
    cfg = composed("experiment=paper", f"model=transformer_{size}", *CLUSTER)
    run, hardware = training_of(cfg), build(cfg, "plan", Hardware)
    ways: list[dict[str, Any]] = [{"sharded": s, "recompute": r} for s in (False, True) for r in (False, True)]
    memory = [count_memory(run, **way).total / 1e9 for way in ways]
    batches = [largest_batch(run, hardware.gpu_gigabytes, **way) for way in ways]
    cells = (
        f"`transformer_{size}`",
        *(f"{each:.0f} / {batch or 'none'}" for each, batch in zip(memory, batches, strict=True)),
        f"{count_communication(run, sharded=False) / 1e9:.0f}",
        f"{count_seconds(run, hardware, 430_000 * 1024) / 86400:.1f}",
    )
    assert f"| {' | '.join(cells)} |" in PAGE
