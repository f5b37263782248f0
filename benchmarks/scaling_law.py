"""How the loss of the image falls with compute, on what the demo has made: `make scaling-law`.

Transformers of six sizes train for the same number of updates on the same pictures in the same order; each one's
learning rate falls to its end, as a run that was stopped on the way would count too high. Their last validation losses
against the operations of their training are fitted with L(C) = L0 + (C / C1)^-a: L0 is what no compute takes away, the
scatter of places and sizes that captions do not tell (Henighan et al. 2020, "Scaling laws for autoregressive generative
modeling", eq. 1.1). As all have as many updates, compute grows with the size alone: that paper's law is of the best
size for each compute, which needs runs of several lengths. Learning rates of all weights go with 1 / width, as Adam's
of hidden matrices in Yang et al. 2022, "Tensor programs V", table 3; the demo's is for a width of 128.

Writes `scaling_law.json` and a picture of the curves and the fit. Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import hydra
import matplotlib.figure
import numpy as np
import scipy.optimize
import torch
from measure import Rows, configuration, machine, print_tables, train, write_report
from tqdm import tqdm

from dalle1.atomic_files import atomic
from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.evaluation.pictures import read_curves
from dalle1.models.accounting import count_flops, count_weights
from dalle1.models.transformer import DalleTransformer

# Layers and width; heads are 32 wide, as the demo's, where that divides the width, else there is one.
SIZES = ((1, 32), (2, 48), (2, 64), (3, 96), (4, 128), (6, 192))
_HEAD = 32
_DEMO_RATE, _DEMO_WIDTH = 4e-3, 128
_LAST_SHARE = 0.03  # of the rate at the end, as in the demo
METRIC = "val/image_nats_per_token"


def options_of(n_layers: int, d_model: int, *, updates: int) -> list[str]:
    """What makes the demo's transformer one of this size, trained for so long."""
    rate = _DEMO_RATE * _DEMO_WIDTH / d_model
    return [
        *("stage=transformer", "experiment=shapes", f"model.n_layers={n_layers}", f"model.d_model={d_model}"),
        *(f"model.n_heads={max(d_model // _HEAD, 1)}", f"optim.max_steps={updates}"),
        *(f"optim.lr={rate:.4g}", f"optim.final_lr={rate * _LAST_SHARE:.4g}"),
    ]


def fit_power_law(compute: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    """L0, C1 and a of L(C) = L0 + (C / C1)^-a, and one standard error of each.

    Fitted to the relative errors. L0 is held in [0, the least loss), and a above 0.

    Raises: ValueError for fewer than 4 points.
    """
    if len(compute) < 4:
        raise ValueError(f"a fit of 3 numbers and their errors needs at least 4 points, got {len(compute)}")

    def law(log_compute: np.ndarray, floor: float, log_scale: float, exponent: float) -> np.ndarray:
        return floor + np.exp(-exponent * (log_compute - log_scale))

    log_compute = np.log(compute)
    slope, offset = np.polyfit(log_compute, np.log(loss), 1)
    start = (0.5 * loss.min(), offset / max(-slope, 1e-3), max(-slope, 1e-3))
    bounds = ([0, -np.inf, 1e-6], [loss.min(), np.inf, np.inf])
    found, covariance = scipy.optimize.curve_fit(
        law, log_compute, loss, p0=start, sigma=loss, bounds=bounds, maxfev=100_000, x_scale=np.maximum(start, 1e-3)
    )
    floor, log_scale, exponent = found
    errors = dict(zip(("L0", "ln C1", "a"), np.sqrt(np.diag(covariance)).tolist(), strict=True))
    return {"L0": float(floor), "C1": float(np.exp(log_scale)), "a": float(exponent), "standard_errors": errors}


def measure(size: tuple[int, int], run_dir: Path, *, results: Path, tokens: Path, updates: int) -> dict[str, Any]:
    """Train one size, unless that is done; its weights, operations and losses."""
    options = options_of(*size, updates=updates)
    train(
        *options,
        *(f"results_dir={results}", f"run_dir={run_dir}", f"data.tokens={tokens}"),
        *(f"trainer.val_check_interval={max(updates // 10, 1)}", "trainer.enable_progress_bar=false"),
        "~callbacks.pictures",
    )
    cfg = configuration(*options)
    model = hydra.utils.instantiate(cfg.model)
    with torch.device("meta"):
        weights = count_weights(DalleTransformer(model))
    per_update = 3 * count_flops(model).total * cfg.optim.batch_size
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "n_layers": size[0],
        "d_model": size[1],
        "weights": weights.total,
        "flops_per_update": per_update,
        "flops": per_update * updates,
        "wall_seconds": summary["wall_seconds"],
        "image_nats_per_token": summary["image_nats_per_token"],
        "curve": read_curves(run_dir)[METRIC],
    }


def draw(runs: list[dict[str, Any]], law: dict[str, Any], path: Path) -> None:
    """Validation losses of all runs against compute, and the fit through their ends."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        steps, losses = (np.array(values) for values in zip(*run["curve"], strict=True))
        label = f"{run['n_layers']} x {run['d_model']}, {run['weights'] / 1e3:,.0f} k weights"
        (line,) = axes.plot(steps * run["flops_per_update"], losses, linewidth=1, label=label)
        axes.plot(run["flops"], run["image_nats_per_token"], "o", color=line.get_color())
    compute = np.geomspace(min(run["flops"] for run in runs), max(run["flops"] for run in runs), 100)
    fit = law["L0"] + (compute / law["C1"]) ** -law["a"]
    axes.plot(compute, fit, "k--", linewidth=1, label=f"{law['L0']:.4f} + (C / {law['C1']:.2g})^-{law['a']:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="training compute C, floating-point operations")
    axes.set_ylabel("nats per image token, validation")
    axes.legend(fontsize=8, frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def table(runs: list[dict[str, Any]], law: dict[str, Any]) -> Rows:
    """A row for each size."""
    return [
        {
            "layers x width": f"{run['n_layers']} x {run['d_model']}",
            "weights": run["weights"],
            "operations": f"{run['flops']:.2e}",
            "minutes": f"{run['wall_seconds'] / 60:.1f}",
            "nats per image token": f"{run['image_nats_per_token']:.4f}",
            "the fit": f"{law['L0'] + (run['flops'] / law['C1']) ** -law['a']:.4f}",
        }
        for run in runs
    ]


@errors_in_one_line()
def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/shapes"), help="of the demo (default: runs/shapes)")
    parser.add_argument("--updates", type=int, default=3000, help="of each run (default: 3000)")
    default = Path("runs/bench/scaling_law.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}; runs are beside it")
    options = parser.parse_args()
    require_int("--updates", options.updates, at_least=10)
    directory = options.out.with_suffix("") / str(options.updates)
    tokens = directory / "tokens"
    train("stage=tokens", "experiment=shapes", f"results_dir={options.results}", f"run_dir={tokens}")
    runs = []
    for size in tqdm(SIZES, desc="sizes", disable=None):
        run_dir = directory / "x".join(map(str, size))
        runs.append(measure(size, run_dir, results=options.results, tokens=tokens, updates=options.updates))
    compute, losses = (np.array([run[name] for run in runs]) for name in ("flops", "image_nats_per_token"))
    law = fit_power_law(compute, losses)
    rows = table(runs, law)
    write_report(options.out, rows, {}, runs=runs, law=law)
    draw(runs, law, options.out.with_suffix(".png"))
    print(machine())
    print_tables(options.out, rows)
    print(f"L(C) = {law['L0']:.4f} + (C / {law['C1']:.3g})^-{law['a']:.3f}")
    print(f"picture:  {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
