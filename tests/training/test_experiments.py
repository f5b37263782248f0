"""Every experiment trains: its own options at toy size; and its header says what the table in docs/ shows."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dalle1.checkpoint import read_checkpoint
from dalle1.cli import quote_options
from dalle1.plan import training_of
from dalle1.training.cost import Hardware, count_seconds
from dalle1.training.run import build, run

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
FIELDS = ("Shows", "Hardware", "Hours", "Expected")

# Sizes alone: everything else is the experiment's.
TOY = {
    "common": ["grid_size=4", "image_vocab_size=16", "text_vocab_size=300", "text_seq_len=64", "trainer=cpu"],
    "tokenizer": [],
    "dvae": [
        *("model.n_hid=16", "optim.batch_size=2", "optim.max_steps=2", "optim.warmup_steps=1", "optim.decay_steps=0"),
    ],
    "clip": [
        *("model.image_size=16", "model.patch_size=8", "model.embed_dim=8"),
        *("model.image_width=16", "model.image_layers=1", "model.image_heads=2"),
        *("model.text_width=16", "model.text_layers=1", "model.text_heads=2"),
        *("optim.batch_size=4", "optim.max_steps=2", "optim.warmup_steps=1"),
    ],
    "transformer": [
        *("model.d_model=16", "model.n_layers=3", "model.n_heads=2", "model.conv_kernel_size=3"),
        *("optim.batch_size=2", "optim.max_steps=2", "optim.warmup_steps=1"),
    ],
}


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def toy_dvae(experiment: str) -> tuple[int, list[str]]:
    """Pixels a side of a picture of 4 x 4 tokens, and what else an experiment's dVAE needs to be small."""
    cfg = compose("train", ["stage=dvae", f"experiment={experiment}", "name=test", "run_dir=unused"])
    # Codes that start from features are as wide, and must start within the two updates.
    width = 16 * 2 ** (cfg.model.n_groups - 1)
    start = ["optim.codebook_start_step=1", "optim.codebook_start_pictures=8", f"model.n_init={width}"]
    return 4 * cfg.image_size // cfg.grid_size, start if cfg.optim.codebook_start_step else ["model.n_init=16"]


@pytest.mark.parametrize("experiment", [path.stem for path in FILES])
def test_stages_of_experiment_train(
    experiment: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle1.training.run.save_curves", lambda *_: None)  # a second each
    image_size, dvae = toy_dvae(experiment)
    for stage in ("tokenizer", "dvae", "clip", "transformer"):
        overrides = [
            *(f"stage={stage}", f"experiment={experiment}", f"image_size={image_size}"),
            *(*TOY["common"], *TOY[stage], *(dvae if stage == "dvae" else [])),
            *("name=test", f"results_dir={tmp_path}", f"run_dir={tmp_path / stage}", "data.num_workers=0"),
            *("data.recipe=null", f"data.train={shapes}/train-*.tar", f"data.val={shapes}/val-*.tar"),
        ]
        summary = run(compose("train", overrides))
        if stage == "tokenizer":
            continue
        assert summary["step"] == 2
        assert math.isfinite(summary["loss"])
        checkpoint = read_checkpoint(tmp_path / stage / "checkpoints" / "last.ckpt")
        assert (checkpoint["global_step"], checkpoint["dalle1"]["kind"]) == (2, stage)


def header(path: Path) -> dict[str, str]:
    """The fields of an experiment's header, and its commands, one a line."""
    lines = re.match(r"# @package _global_\n((?:#.*\n)+)", path.read_text(encoding="utf-8"))
    assert lines, f"{path.name} begins with its header"
    text, _, commands = lines[1].partition("# Commands:")
    assert commands, f"{path.name} has commands"
    fields = dict(re.findall(r"^# (\w+): (.+)$", text, flags=re.MULTILINE))
    assert tuple(fields) == FIELDS, f"{path.name} has {', '.join(FIELDS)}, and nothing else"
    return fields | {"Commands": re.sub(r"^#  ", "", commands.partition("\n")[2], flags=re.MULTILINE)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_commands_of_the_header_compose(path: Path) -> None:
    commands = header(path)["Commands"]
    trains = [line.split("python train.py ")[1] for line in commands.splitlines() if "python train.py " in line]
    assert trains or "make demo" in commands
    for line in trains:
        options = shlex.split(line.replace("$stage", "clip"))  # all stages compose, in tests/test_configs.py
        cfg = compose("train", [*quote_options(options, path_options=["data.train", "data.val"]), "run_dir=unused"])
        assert f"experiment={path.stem}" in options
        assert cfg.data.train is not None, "the shards have to be named"


def test_page_has_what_the_headers_say() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip("`"): dict(zip(FIELDS, cells[1:], strict=True))
        for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines())
        if len(cells) == len(FIELDS) + 1 and re.fullmatch(r"`\w+`", cells[0])
    }
    # Pages are links on the page.
    shown = {
        name: {field: re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text).rstrip(".") for field, text in row.items()}
        for name, row in rows.items()
    }
    expected = {
        path.stem: {field: re.sub(r"docs/(\w+)\.md", r"\1", header(path)[field]).rstrip(".") for field in FIELDS}
        for path in FILES
    }
    assert shown == expected


@pytest.mark.parametrize(
    ("experiment", "options"),
    [
        ("emoji_gpu", ["plan.gpu_gigabytes=24", "plan.teraflops=165"]),
        ("cc3m_small", ["plan.gpu_gigabytes=24", "plan.teraflops=165"]),
        ("cc3m_xl", ["trainer.devices=8"]),
    ],
)
def test_hours_that_the_header_has_from_the_plan_are_the_plans(experiment: str, options: list[str]) -> None:
    cfg = compose("plan", [f"experiment={experiment}", *options, "name=test", "run_dir=unused"])
    hardware = build(cfg, "plan", Hardware)
    run_of, text = training_of(cfg), header(ROOT / "conf" / "experiment" / f"{experiment}.yaml")["Hours"]
    hours = count_seconds(run_of, hardware, cfg.optim.max_steps * run_of.global_batch) / 3600
    assert f"transformer {hours:.1f} by dalle1.plan" in text
