"""Loss and bytes sent with each way of averaging gradients, on what the demo has made: `make bench-communication`.

Every run is `train.py stage=transformer experiment=shapes trainer=ddp` in two processes that talk by gloo, on image
tokens that are made before. The paper's rank is 0.27 to 0.23 of the width; here it is a quarter and a half. Runs with
the same seed see the same pictures in the same order; what seeds differ by is the noise that differences between ways
stand beside.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
from pathlib import Path

import hydra
import torch
from measure import Rows, configuration, machine, print_tables, train, write_report
from tqdm import tqdm

from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.models.transformer import DalleTransformer
from dalle1.training.communication import Communication, handed_bytes

# Of a width of 128. In 8 parts: what each GPU of the paper's machines has.
_SGD = ("communication=powersgd", "communication.rank=32")
_PARTS = (*_SGD, "communication.shards=8", "communication.factors=fp32")
WAYS = {
    "plain": ["communication=plain"],
    "bf16": ["communication=bf16"],
    "powersgd, rank 32": list(_SGD),
    "powersgd, rank 32 in 8 parts, fp32": list(_PARTS),
    "powersgd, rank 32 in 8 parts, fp32, Q of the last update": [*_PARTS, "communication.fixed_q=false"],
    "powersgd, rank 64 in 8 parts": ["communication=powersgd", "communication.rank=64", "communication.shards=8"],
}


def measure(way: str, run_dir: Path, *, results: Path, tokens: Path, updates: int, seed: int) -> dict[str, float]:
    """One run: nats per image token of validation, and what was sent in an update."""
    train(
        *("stage=transformer", "experiment=shapes", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
        *(f"results_dir={results}", f"run_dir={run_dir}", f"data.tokens={tokens}", f"seed={seed}", *WAYS[way]),
        *(f"optim.max_steps={updates}", "optim.batch_size=4", "optim.lr=2e-3", "optim.caption_dropout=0"),
        *("trainer.enable_progress_bar=false", "~callbacks.pictures"),
    )
    summary = json.loads((run_dir / "summary.json").read_text())
    with next(run_dir.glob("logs/*/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    sent = [float(row["perf/sent_megabytes"]) for row in rows if row.get("perf/sent_megabytes")]
    saved = [float(row["perf/sent_saved"]) for row in rows if row.get("perf/sent_saved")]
    return {
        "image_nats_per_token": summary["image_nats_per_token"],
        "megabytes": sent[-1] if sent else plain_megabytes(),
        "saved": saved[-1] if saved else 0.0,
    }


def plain_megabytes() -> float:
    """What plain fp32 hands to all-reduce, by arithmetic: DDP's own way is not counted while it runs."""
    with torch.device("meta"):
        network = DalleTransformer(hydra.utils.instantiate(configuration("stage=transformer").model))
    return handed_bytes(Communication(), network) / 1e6


def table(found: dict[str, list[dict[str, float]]]) -> Rows:
    """Means over seeds, and the mean and the spread of the differences from plain with the same seed."""
    rows: Rows = []
    plain = [each["image_nats_per_token"] for each in found["plain"]]
    for way, runs in found.items():
        nats = [each["image_nats_per_token"] for each in runs]
        differences = [mine - other for mine, other in zip(nats, plain, strict=True)]
        rows.append(
            {
                "way": way,
                "MB per update": f"{runs[0]['megabytes']:.2f}",
                "saved": f"{runs[0]['saved']:.1%}",
                "nats per image token": f"{statistics.mean(nats):.4f}",
                "of seeds": f"{statistics.stdev(nats):.4f}",
                "over plain": f"{statistics.mean(differences):+.4f}",
                "of seeds, that": f"{statistics.stdev(differences):.4f}",
            }
        )
    return rows


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/shapes"), help="of the demo (default: runs/shapes)")
    parser.add_argument("--updates", type=int, default=300, help="of each run (default: 300)")
    parser.add_argument("--seeds", type=int, default=2, help="default: 2")
    default = Path("runs/bench/communication.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    require_int("--updates", options.updates, at_least=200)
    require_int("--seeds", options.seeds, at_least=2)
    if options.out.suffix != ".json":
        # Its directory, without the ending, is emptied.
        raise ValueError(f"--out must end with .json, got '{options.out}'")
    directory = options.out.with_suffix("")
    shutil.rmtree(directory, ignore_errors=True)  # else earlier runs would be continued
    tokens = directory / "tokens"
    train("stage=tokens", "experiment=shapes", f"results_dir={options.results}", f"run_dir={tokens}")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(options.seeds):
        for way in tqdm(WAYS, desc=f"seed {seed}", disable=None):
            run_dir = directory / f"{way.replace(' ', '-').replace(',', '')}-{seed}"
            numbers = measure(way, run_dir, results=options.results, tokens=tokens, updates=options.updates, seed=seed)
            found[way].append(numbers)
    rows = table(found)
    write_report(options.out, rows, {}, runs=[{"way": way, **each} for way, runs in found.items() for each in runs])
    print(machine())
    print_tables(options.out, rows)


if __name__ == "__main__":
    main()
