"""Quality per minute and speed of our dVAE against DALLE-pytorch's, in one run: `make bench-dvae`.

Both get the same pictures (128x128 crops of the same shards in the same order), the same wall-clock time and all
cores: ours through `train.py stage=dvae experiment=photos`, its start and validations included; theirs with the loop
and the defaults of its own script (see `peer_dvae`). Hard reconstructions of the validation pictures are compared.
Then steps of both are timed in turns, with the same allocator, and encoding with the paper's dVAE is measured.

Writes `dvae.json` (command, machine, date, rows, ratios) and a picture of reconstructions.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dalle1  # noqa: F401 - before torch, so that threads of both sides wait as they do in training

# isort: split
import hydra
import peer_dvae
import torch
from measure import ROOT, Rows, configuration, in_own_process, print_tables, write_report
from torch import Tensor
from tqdm import tqdm

from dalle1.checkpoint import load_dvae
from dalle1.cli import errors_in_one_line
from dalle1.data.config import DataConfig
from dalle1.data.datamodule import PairDataModule
from dalle1.data.fields import require_int
from dalle1.data.transforms import to_unit_interval
from dalle1.evaluation.codebook_usage import codebook_usage
from dalle1.evaluation.image_quality import psnr_db, squared_error, ssim
from dalle1.evaluation.pictures import save_picture, to_pictures
from dalle1.losses import logit_laplace_nll, negative_elbo
from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.models.pixels import map_pixels
from dalle1.picture_grid import GridBlock, draw_page
from dalle1.training.dvae_module import DVAEOptimConfig
from dalle1.training.optim import build_optimizer

SIZE = 128  # pixels a side
# Share of the budget that our updates are planned to take: the rest is for the start of the process, the start of
# the codebook, validations and the noise of the machine.
_PLANNED_SHARE = 0.85
_AUTOENCODER_STEP = 0.25  # of the time of a step with codes; measured once
_SPEED_BATCHES = {128: 8, 256: 4}  # picture size: batch


def config(*overrides: str) -> Any:
    """The configuration of `train.py stage=dvae experiment=photos`."""
    return configuration("stage=dvae", "experiment=photos", *overrides)


# Quality for the same time


def train_ours(options: list[str], run_dir: Path, *, seconds: float, step_seconds: float) -> DVAE:
    """Train as a user does, with as many updates as fit into the time."""
    schedule = config().optim
    start = schedule.codebook_start_step / schedule.max_steps
    mean_step_seconds = step_seconds * (1 - start + start * _AUTOENCODER_STEP)
    steps = max(int(seconds * _PLANNED_SHARE / mean_step_seconds), 100)
    share = steps / schedule.max_steps
    command = [
        *(sys.executable, str(ROOT / "train.py"), "stage=dvae", "experiment=photos", f"run_dir={run_dir}", *options),
        f"optim.max_steps={steps}",
        *(f"optim.{name}={int(schedule[name] * share)}" for name in ("temperature_steps", "kl_weight_steps")),
        f"optim.codebook_start_step={int(schedule.codebook_start_step * share)}",
    ]
    subprocess.run(command, check=True)
    return load_dvae(run_dir / "checkpoints" / "last.ckpt").model


def train_peer(data: PairDataModule, *, seconds: float) -> Any:
    """Train the peer on the same batches for the same time."""
    model = peer_dvae.build(SIZE)
    with tqdm(total=100, desc="DALLE-pytorch", unit="%", disable=None) as bar:
        for over, loss in peer_dvae.Trainer(model).train(_batches(data), seconds=seconds):
            bar.update(int(100 * over) - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    return model


def _batches(data: PairDataModule) -> Iterator[Tensor]:
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            yield to_unit_interval(batch["pixels"])


def shards(options: argparse.Namespace, seed: int) -> list[str]:
    """The pictures as options of `train.py`."""
    return [f"data.train='{options.train}'", f"data.val='{options.val}'", f"seed={seed}"]


def pictures(options: argparse.Namespace, seed: int) -> PairDataModule:
    """The pictures, cropped as for our training."""
    cfg = hydra.utils.instantiate(config(*shards(options, seed)).data, _convert_="all")
    assert isinstance(cfg, DataConfig)
    data = PairDataModule(cfg)
    data.setup("fit")
    return data


def compare_quality(options: argparse.Namespace, *, seed: int, step_seconds: float) -> dict[str, dict[str, Any]]:
    """Train both for `options.minutes` from one seed, and what each gives; writes a picture of reconstructions."""
    data = pictures(options, seed)
    torch.manual_seed(seed)
    seconds = 60 * options.minutes
    started = time.monotonic()
    peer = train_peer(data, seconds=seconds)
    peer_seconds = time.monotonic() - started
    run_dir = options.out.with_suffix("") / f"seed{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)  # else an earlier comparison would be continued
    started = time.monotonic()
    ours = train_ours(shards(options, seed), run_dir, seconds=seconds, step_seconds=step_seconds)
    our_seconds = time.monotonic() - started
    sides = {"ours": partial(reconstruct_ours, ours), "peer": partial(peer_dvae.reconstruct, peer)}
    image = to_unit_interval(next(iter(data.val_dataloader()))["pixels"][:8])
    rows = {"original": image, **{side: reconstruct(image)[1] for side, reconstruct in sides.items()}}
    blocks = [GridBlock(title=name, pictures=to_pictures(row), columns=len(row)) for name, row in rows.items()]
    save_picture(draw_page(blocks), run_dir / "compared.png")
    took = {"ours": our_seconds, "peer": peer_seconds}
    return {side: {"seconds": round(took[side]), **quality(reconstruct, data)} for side, reconstruct in sides.items()}


@torch.no_grad()
def reconstruct_ours(model: DVAE, image: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and hard reconstructions in [0, 1]."""
    tokens = model.encode(image)
    return tokens, model.decode(tokens)


def quality(reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]], data: PairDataModule) -> dict[str, Any]:
    """Means over the validation pictures, of hard reconstructions; code use over all of them."""
    counts = torch.zeros(8192, dtype=torch.int64)
    psnr, similarity = [], []
    for batch in data.val_dataloader():
        original = to_unit_interval(batch["pixels"])
        tokens, image = reconstruct(original)
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
        psnr.append(psnr_db(squared_error(image, original)))
        similarity.append(ssim(image, original))
    usage = codebook_usage(counts)
    return {
        "psnr_db": round(float(torch.cat(psnr).mean()), 2),
        "ssim": round(float(torch.cat(similarity).mean()), 3),
        "codes_used": usage.n_used,
        "perplexity": round(usage.perplexity, 1),
    }


# Speed and memory


def our_step(size: int) -> Callable[[], float]:
    """One update of `model=dvae_photos`: both networks, the bound with its KL, clipping, AdamW, averaging."""
    cfg = config(f"image_size={size}")
    model, optim = DVAE(hydra.utils.instantiate(cfg.model)), hydra.utils.instantiate(cfg.optim)
    assert isinstance(optim, DVAEOptimConfig)
    optimizer = build_optimizer(model, optim)
    image = torch.rand(_SPEED_BATCHES[size], 3, size, size)
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]

    def step() -> float:
        parameters, kl = model.relaxed(image, temperature=0.5)
        nll = logit_laplace_nll(map_pixels(image), parameters, min_log_scale=optim.min_log_scale)
        loss = negative_elbo(nll, kl, kl_weight=optim.kl_weight)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, optim.grad_clip_norm)
        optimizer.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - optim.ema_decay)
        return float(loss.detach())

    return step


def peer_step(size: int) -> Callable[[], float]:
    """One whole update of the peer."""
    trainer = peer_dvae.Trainer(peer_dvae.build(size))
    image = torch.rand(_SPEED_BATCHES[size], 3, size, size)
    return lambda: trainer.update(image)


def time_steps(size: int, *, rounds: int) -> dict[str, float]:
    """Median seconds per step of both, measured in turns so that noise of the machine meets both alike."""
    steps = {"ours": our_step(size), "peer": peer_step(size)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(rounds + 1), desc=f"steps at {size} px", disable=None):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _two_steps(side: str, size: int) -> None:
    step = our_step(size) if side == "ours" else peer_step(size)
    step()
    step()


def _encode_with_paper(batch: int) -> float:
    """Pictures of 256x256 encoded per second by the paper's dVAE, with random weights."""
    model = DVAE(DVAEConfig()).eval()
    image = torch.rand(batch, 3, 256, 256)
    with torch.inference_mode():
        model.encode(image[:1])
        started = time.perf_counter()
        model.encode(image)
    return batch / (time.perf_counter() - started)


def speed_rows(rounds: int) -> tuple[Rows, dict[str, float]]:
    """Pictures per second and peak memory of training steps, and of encoding with the paper's dVAE; ratios."""
    rows: Rows = []
    ratios = {}
    for size, batch in _SPEED_BATCHES.items():
        seconds = time_steps(size, rounds=rounds)
        ratios[f"speed_{size}"] = round(seconds["peer"] / seconds["ours"], 2)
        for side, each in seconds.items():
            _, peak = in_own_process(_two_steps, side, size)
            what = f"training step, {size} px, batch {batch}"
            rows.append(
                {"what": what, "side": side, "images_per_second": round(batch / each, 2), "peak_gb": round(peak, 2)}
            )
    for batch in (1, 8):
        rate, peak = in_own_process(_encode_with_paper, batch)
        what = f"encode, paper's dVAE, 256 px, batch {batch}"
        rows.append({"what": what, "side": "ours", "images_per_second": round(rate, 2), "peak_gb": round(peak, 2)})
    return rows, ratios


def quality_ratios(results: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Ours against theirs, of means over the seeds; `time` says whether the time was the same."""
    means = {
        side: {
            name: statistics.mean(result[side][name] for result in results)
            for name in ("psnr_db", "perplexity", "seconds")
        }
        for side in ("ours", "peer")
    }
    ours, peer = means["ours"], means["peer"]
    return {
        "psnr_gain_db": round(ours["psnr_db"] - peer["psnr_db"], 2),
        "perplexity": round(ours["perplexity"] / peer["perplexity"], 2),
        "time": round(ours["seconds"] / peer["seconds"], 2),
    }


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training shards: path, glob in quotes")
    parser.add_argument("--val", required=True, help="validation shards")
    parser.add_argument("--minutes", type=float, default=15, help="wall-clock time of each side and seed (default: 15)")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, with seeds 0, 1, ... (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side (default: 7)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/dvae.json"), help="default: runs/bench/dvae.json")
    options = parser.parse_args()
    require_int("--seeds", options.seeds, at_least=1)
    require_int("--rounds", options.rounds, at_least=1)
    if not 0 < options.minutes < math.inf:
        raise ValueError(f"--minutes must be > 0, got {options.minutes}")
    torch.set_flush_denormal(True)  # as training does; for both sides
    # Before anything takes time.
    pictures(options, 0)
    peer_dvae.build(SIZE)
    rows, ratios = speed_rows(options.rounds)
    step_seconds = next(_SPEED_BATCHES[SIZE] / row["images_per_second"] for row in rows if row["side"] == "ours")
    results = []
    for seed in range(options.seeds):
        results.append(compare_quality(options, seed=seed, step_seconds=step_seconds))
        # After each, for what comes next takes long.
        ratios |= quality_ratios(results)
        quality_rows = [
            {"what": f"seed {number}", "side": side, **values}
            for number, result in enumerate(results)
            for side, values in result.items()
        ]
        write_report(options.out, quality_rows + rows, ratios)
    print_tables(options.out, quality_rows, rows, [ratios])


if __name__ == "__main__":
    main()
