"""What a run says of itself is what others find: its evaluation has its numbers, its row in a comparison too."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from stage_runs import last

from dalle1.checkpoint import load_dvae, load_image_tokenizer, load_transformer
from dalle1.compare import compare
from dalle1.evaluation.captioned_tokens import CaptionedTokens
from dalle1.evaluation.ranks import Ranks
from dalle1.evaluation.transformer_likelihood import evaluate_transformer
from dalle1.run_records import find_runs, read_run


def test_evaluation_of_the_validation_set_has_the_numbers_of_training(
    trained: Path, shapes: Path, tmp_path: Path
) -> None:
    transformer = load_transformer(last(trained, "transformer"))
    samples = CaptionedTokens.open([f"{shapes}/val-*.tar"], transformer, load_image_tokenizer(last(trained, "dvae")))
    cpu = torch.device("cpu")
    values = evaluate_transformer(samples, transformer, cache=tmp_path, ranks=Ranks(), device=cpu, batch_size=3).values
    summary = json.loads((trained / "transformer" / "summary.json").read_text())
    names = ("text_nats_per_token", "text_accuracy", "image_nats_per_token", "image_accuracy")
    assert {name: values[name] for name in names} == pytest.approx({name: summary[name] for name in names}, rel=1e-5)
    assert values["samples"] == 8


def test_comparison_has_the_numbers_of_the_summary(trained: Path) -> None:
    runs = [read_run(run, now=time.time()) for run in find_runs([str(trained)])[0]]
    assert all(run.problems == () and run.state == "complete" for run in runs)
    groups = {group["stage"]: group for group in compare(runs)["stages"]}
    assert set(groups) == {"tokenizer", "dvae", "clip", "transformer"}
    for stage in ("dvae", "clip", "transformer"):
        (row,) = groups[stage]["runs"]
        summary = json.loads((trained / stage / "summary.json").read_text())
        metric = {"dvae": "nats_per_dim"}.get(stage, "loss")
        assert row["metrics"][f"val/{metric}"]["last"] == summary[metric]
        # Curves are kept in fewer digits.
        assert row["metrics"][f"val/{metric}"]["best"] == pytest.approx(summary[f"best_{metric}"], rel=1e-5)
        assert row["metrics"][f"val/{metric}"]["best_step"] == summary["best_step"]
        assert (row["step"], row["max_steps"], row["wall_seconds"]) == (8, 8, summary["wall_seconds"])
        assert row["pictures_per_second"] > 0
    dvae = load_dvae(last(trained, "dvae")).model
    assert groups["dvae"]["runs"][0]["n_weights"] == sum(weight.numel() for weight in dvae.parameters())
