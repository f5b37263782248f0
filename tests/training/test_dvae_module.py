"""What a dVAE's validation measures, counts and draws."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stage_runs import Train
from torch import Tensor

from dalle1.checkpoint import load_dvae, read_checkpoint, weights_sha256
from dalle1.data.dataset import PairDataset
from dalle1.data.preparation import Batch, Preparation, collate
from dalle1.data.shards import ShardIndex
from dalle1.data.transforms import to_unit_interval
from dalle1.evaluation.codebook_usage import codebook_usage
from dalle1.evaluation.image_quality import psnr_db, squared_error, ssim
from dalle1.losses import logit_laplace_nll
from dalle1.models.dvae import DVAE
from dalle1.models.pixels import map_pixels
from dalle1.training.dvae_module import DVAEModule, DVAEOptimConfig


@pytest.fixture
def make_module(
    make_dvae: Callable[..., DVAE], optim_numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., DVAEModule]:
    """A module after update `step` whose logged values are in `logged`; keywords go to its optimizer configuration."""

    def make(step: int = 5, **options: object) -> DVAEModule:
        module = DVAEModule(make_dvae(), DVAEOptimConfig(**(optim_numbers | options)), seed=3)
        monkeypatch.setattr(module, "log_means", lambda split, values, size, **_: setattr(module, "logged", values))
        monkeypatch.setattr(DVAEModule, "global_step", step)
        monkeypatch.setattr(DVAEModule, "global_rank", 0)
        return module

    return make


def batch_of(*shape: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {"pixels": torch.randint(256, shape, dtype=torch.uint8, generator=generator)}  # type: ignore[typeddict-item]


def validated(module: DVAEModule, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
    with torch.no_grad():
        module.validation_step(batch, batch_idx)
    return module.logged  # type: ignore[return-value]


def test_summary_is_what_the_checkpoint_gives(trained: Path, shapes: Path) -> None:
    summary = json.loads((trained / "dvae" / "summary.json").read_text())
    dvae = load_dvae(trained / "dvae" / "checkpoints" / "last.ckpt").model
    pictures = PairDataset(ShardIndex(f"{shapes}/val-*.tar"), Preparation(image_size=16))
    image = to_unit_interval(collate([pictures[i] for i in range(len(pictures))])["pixels"])

    logits = dvae.logits(image)
    seen = dvae.decode(logits.argmax(-1))
    parameters = dvae.decode_vectors(dvae.codebook[logits.argmax(-1)])
    usage = codebook_usage(torch.bincount(logits.argmax(-1).flatten(), minlength=16))
    expected = {
        "mse": float(squared_error(seen, image).mean()),
        "psnr_db": float(psnr_db(squared_error(seen, image)).mean()),
        "ssim": float(ssim(seen, image).mean()),
        "nats_per_dim": float(logit_laplace_nll(map_pixels(image), parameters, min_log_scale=0.0).mean()),
        # ln 16 less the entropy
        "kl_per_position": math.log(16) - float(torch.distributions.Categorical(logits=logits).entropy().mean()),
        "codes_used_share": usage.used_share,
        "code_perplexity": usage.perplexity,
        "dead_codes": usage.n_dead,
        "temperature": 1 / 16,
        "kl_weight": 0.03 * 0.5 * (1 - math.cos(math.pi * 8 / 1500)),
    }
    # Batches of another size are summed in another order.
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert {"relaxed_mse", "relaxed_psnr_db", "relaxed_nats_per_dim", "loss", "negative_elbo"} <= set(summary)


def test_relaxed_codes_at_a_low_temperature_without_doubt_are_the_hard_ones(
    make_module: Callable[..., DVAEModule],
) -> None:
    module = make_module(temperature_start=1e-3, temperature_end=1e-3)
    with torch.no_grad():
        module.model.encoder.head.weight.mul_(1e4)
    values = validated(module, batch_of(2, 3, 12, 16))
    for name in ("mse", "psnr_db", "nats_per_dim"):
        torch.testing.assert_close(values[f"relaxed_{name}"], values[name])


def test_bound_is_the_relaxed_likelihood_and_the_divergence_in_nats_per_value(
    make_module: Callable[..., DVAEModule],
) -> None:
    values = validated(make_module(kl_weight=6.6, kl_weight_steps=5), batch_of(2, 3, 12, 16))
    # 3 x 4 positions, 3 x 12 x 16 values
    divergence = values["kl_per_position"] * 12 / (3 * 12 * 16)
    torch.testing.assert_close(values["negative_elbo"], values["relaxed_nats_per_dim"] + divergence)
    torch.testing.assert_close(values["loss"], values["relaxed_nats_per_dim"] + 6.6 * divergence)
    assert values["kl_weight"] == 6.6


def test_noise_of_validation_depends_on_step_and_batch_alone(make_module: Callable[..., DVAEModule]) -> None:
    batch = batch_of(2, 3, 12, 16)
    first = validated(make_module(step=5), batch)
    again = validated(make_module(step=5), batch)
    other_batch = validated(make_module(step=5), batch, batch_idx=1)
    assert {name: float(value) for name, value in first.items()} == {name: float(v) for name, v in again.items()}
    assert first["relaxed_mse"] != other_batch["relaxed_mse"]
    assert first["mse"] == other_batch["mse"]
    # Warmer by nothing: the step enters through the seed alone.
    flat = {"temperature_start": 0.5, "temperature_end": 0.5}
    assert (
        validated(make_module(step=5, **flat), batch)["relaxed_mse"]
        != (validated(make_module(step=6, **flat), batch)["relaxed_mse"])
    )


def test_similarity_of_pictures_below_its_window_is_left_out(make_module: Callable[..., DVAEModule]) -> None:
    assert "ssim" in validated(make_module(), batch_of(1, 3, 12, 16))
    assert "ssim" not in validated(make_module(), batch_of(1, 3, 8, 16))


def test_before_the_codebook_starts_the_autoencoder_is_validated_and_drawn(train: Train, tmp_path: Path) -> None:
    # At step 4 the codebook is about to start: the next update has codes, this validation has none.
    summary = train(tmp_path, "dvae", "optim.codebook_start_step=4")
    pictures = {path.name for path in (tmp_path / "dvae" / "pictures").iterdir()}
    assert pictures == {
        "reconstructions-step0000004.png",
        "reconstructions-step0000008.png",
        "code_use-step0000008.png",
    }
    heights = []
    for step in (4, 8):
        with Image.open(tmp_path / "dvae" / "pictures" / f"reconstructions-step000000{step}.png") as picture:
            heights.append(picture.height)
    assert heights[1] == 2 * heights[0], "four rows instead of two"
    assert not [name for name in summary if name.startswith("autoencoder")]
    with open(tmp_path / "dvae" / "logs" / "version_0" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/autoencoder_psnr_db"]]
    (row,) = rows
    assert not row["val/psnr_db"]
    assert not row["val/code_perplexity"]


def test_pictures_are_drawn_with_the_averaged_weights(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    draw = DVAEModule.draw_pictures

    def note(self: DVAEModule, batch: Batch) -> dict[str, Image.Image]:
        drawn.append(weights_sha256(dict(self.model.named_parameters())))
        return draw(self, batch)

    monkeypatch.setattr(DVAEModule, "draw_pictures", note)
    train(tmp_path, "dvae")
    content = read_checkpoint(tmp_path / "dvae" / "checkpoints" / "last.ckpt")
    assert drawn[-1] == weights_sha256(content["ema"])


def test_alarm_is_logged_at_every_validation_and_stands_in_the_summary(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dalle1.training.dvae_module.collapse_alarm", lambda usage: "codes must be used")
    with caplog.at_level(logging.WARNING, "dalle1.training.dvae_module"):
        summary = train(tmp_path, "dvae")
    assert summary["alarm"] == "codes must be used"
    # The last one is validated once more for the summary.
    assert caplog.messages == [f"step {step}: codes must be used" for step in (4, 8, 8)]
    assert "alarm" not in json.loads((trained / "dvae" / "summary.json").read_text())
