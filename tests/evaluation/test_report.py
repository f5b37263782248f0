"""The demo's report: what it counts, what it writes, and what its table says."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dalle1.data.shapes import Scene, SceneMix, draw, phrase, sample_claim, sample_scene
from dalle1.data.shapes_shards import ShapesRecipe, write_shapes
from dalle1.decode_and_rank import PromptResult
from dalle1.evaluation.report import STAGES, format_report, held_out_prompts, make_report
from dalle1.pipeline import Pipeline


@pytest.fixture
def results(run_directory: Path, tmp_path: Path) -> Path:
    """The stages' results of a finished run."""
    directory = tmp_path / "shapes"
    shutil.copytree(run_directory / "runs" / "shapes", directory)
    metrics = {"psnr_db": 20.0, "codes_used_share": 0.5, "text_nats_per_token": 1.0, "image_nats_per_token": 2.0}
    for seconds, stage in enumerate(STAGES, 1):
        (directory / stage).mkdir(exist_ok=True)
        (directory / stage / "summary.json").write_text(json.dumps({"wall_seconds": 60.0 * seconds, **metrics}))
    return directory


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Scene]:
    """Prompts and their scenes. In place of samples, each prompt gets its drawing, best first, and an empty picture."""
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng, SceneMix()) for _ in range(20)]
    scenes = {phrase(sample_claim(rng, scene)): scene for scene in drawn}

    def sample(self: Pipeline, prompts: list[str], **_: object) -> list[PromptResult]:
        results = []
        for prompt in prompts:
            picture = draw(scenes[prompt], 60)
            pair = np.stack([picture, np.full_like(picture, 240)])
            results.append(
                PromptResult(
                    prompt=prompt,
                    images=torch.from_numpy(pair).permute(0, 3, 1, 2) / 255,
                    image_tokens=torch.zeros(2, 1, 1, dtype=torch.int64),
                    candidates=[0, 1],
                    scores=[0.9, 0.1],
                    sampled=2,
                )
            )
        return results

    monkeypatch.setattr(Pipeline, "__call__", sample)
    return scenes


def _report(results: Path, scenes: dict[str, Scene]) -> dict[str, Any]:
    return make_report(results, list(scenes), candidates=2, temperature=1.0, guidance_scale=None, seed=0)


def test_report_tells_right_pictures_from_wrong_ones(results: Path, scenes: dict[str, Scene]) -> None:
    report = _report(results, scenes)
    assert report["prompt_accuracy_best_of_2"] == 1
    assert report["prompt_accuracy_single"] == 0.5
    assert report["accuracy_best_of_2"]["color"] == 1
    assert report["accuracy_single"]["color"] == 0.5


def test_report_counts_every_prompt_once(results: Path, scenes: dict[str, Scene]) -> None:
    report = _report(results, scenes)
    names = {"single": "one object", "count": "equal objects", "pair": "relation"}
    expected = Counter(names[scene.kind] for scene in scenes.values())
    assert set(expected) == set(names.values())
    kinds = report["prompt_accuracy_by_kind"]
    assert {kind: values["n_prompts"] for kind, values in kinds.items()} == expected
    assert all((values["single"], values["best"]) == (0.5, 1) for values in kinds.values())
    assert report["n_prompts"] == len(scenes)


def test_report_carries_what_the_stages_measured(results: Path, scenes: dict[str, Scene]) -> None:
    report = _report(results, scenes)
    assert (report["psnr_db"], report["codes_used_share"]) == (20.0, 0.5)
    assert (report["text_nats_per_token"], report["image_nats_per_token"]) == (1.0, 2.0)
    assert report["wall_seconds_by_stage"]["dvae"] == 120
    assert report["wall_seconds"] == pytest.approx(sum(report["wall_seconds_by_stage"].values()), abs=0.1)


def test_table_and_grids_show_the_report(results: Path, scenes: dict[str, Scene]) -> None:
    report = _report(results, scenes)
    table = format_report(report)
    relations = report["prompt_accuracy_by_kind"]["relation"]["n_prompts"]
    held_out = f"{len(scenes)} held-out prompts right"
    for text in ("dvae, wall time", "2:00 min", "20.0 dB", "best of 2 by CLIP", f"relation ({relations})", held_out):
        assert text in table
    assert [Path(grid).is_file() for grid in report["grids"]] == [True, True]
    listed = (results / "report" / "best.txt").read_text().splitlines()
    assert listed == [f"{number}. {prompt}" for number, prompt in enumerate(scenes, 1)]


def _dvae_summary(results: Path, **values: object) -> None:
    path = results / "dvae" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_table_shows_all_that_the_dvae_measured(results: Path, scenes: dict[str, Scene]) -> None:
    _dvae_summary(results, ssim=0.91234, mse=0.0012, relaxed_mse=0.0011, nats_per_dim=-1.25, relaxed_nats_per_dim=-1.5)
    _dvae_summary(results, kl_per_position=4.5, kl_weight=6.6, temperature=0.0625, dead_codes=3.0, code_perplexity=81.5)
    table = format_report(_report(results, scenes))
    for number in ("0.912", "0.0012", "0.0011", "-1.250 nats/dim", "-1.500 nats/dim", "4.50 nats/position", "6.6"):
        assert f"  {number}\n" in table.replace("-1.", "  -1."), number
    assert "never used" in table
    assert "81.5" in table
    assert "alarm" not in table
    assert "not measured" not in table


def test_numbers_that_an_older_run_lacks_are_not_measured(results: Path, scenes: dict[str, Scene]) -> None:
    table = format_report(_report(results, scenes))
    assert table.count("not measured") == 10
    assert "20.0 dB" in table


def test_alarm_of_the_dvae_ends_the_report(results: Path, scenes: dict[str, Scene]) -> None:
    _dvae_summary(results, alarm="code usage has collapsed: lower optim.lr")
    report = _report(results, scenes)
    assert format_report(report).endswith("\nalarm of the dVAE: code usage has collapsed: lower optim.lr")
    assert report["dvae"]["alarm"]


def test_stage_that_is_not_trained_is_named(results: Path, scenes: dict[str, Scene]) -> None:
    (results / "clip" / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run 'python train.py stage=clip' to its end first"):
        _report(results, scenes)


def test_prompts_are_the_first_different_captions(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    write_shapes(ShapesRecipe(directory=str(directory), image_size=16, train_samples=1, val_samples=1, test_samples=30))
    shards = str(directory / "test-*.tar")
    prompts = held_out_prompts(shards, 20)
    assert len(set(prompts)) == 20
    assert held_out_prompts(shards, 5) == prompts[:5]
    with pytest.raises(ValueError, match="need 31 different test captions, got"):
        held_out_prompts(shards, 31)
    with pytest.raises(ValueError, match="prompts must be >= 1, got 0"):
        held_out_prompts(shards, 0)
