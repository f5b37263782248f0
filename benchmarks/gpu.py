"""Training steps of the transformer on one CUDA device: `make bench-gpu`.

`model=transformer_xl` in bf16, blocks compiled, with the largest batch of 64, 32, 16, ... that fits: tokens per second,
share of what the device reaches in plain bf16 matrix products, and peak memory; with and without activation
checkpointing, in the paper's patterns through FlexAttention and with full attention through PyTorch's flash kernels. A
step is forward, backward, clipping and the fused optimizer.

Writes `gpu.json` (command, machine, date, rows, ratios).
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from measure import Rows, configuration, print_tables, write_report
from our_transformer import make_step

from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.models.accounting import count_flops
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.training.throughput import matmul_rate

CUDA = torch.device("cuda")


def model_config(name: str) -> TransformerConfig:
    """A size in the paper's vocabularies and grid."""
    cfg = configuration("stage=transformer", "experiment=paper", f"model={name}")
    config = hydra.utils.instantiate(cfg.model, _convert_="all")
    assert isinstance(config, TransformerConfig)
    return config


def time_step(config: TransformerConfig, batch: int, *, recompute: bool, rounds: int) -> tuple[float, float]:
    """Mean seconds of a step after warming up, and peak memory in GB."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with CUDA:
        model = DalleTransformer(config).train()
    model.execute_blocks(recompute=recompute, compiled=True)
    step = make_step(model, batch)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / rounds, torch.cuda.max_memory_allocated() / 1e9


def fitting_batch(config: TransformerConfig, largest: int, *, recompute: bool, rounds: int) -> dict[str, Any]:
    """Seconds, memory and size of the largest batch, halved until it fits."""
    batch = largest
    while batch:
        try:
            seconds, gigabytes = time_step(config, batch, recompute=recompute, rounds=rounds)
        except torch.OutOfMemoryError:
            batch //= 2
        else:
            return {"batch": batch, "seconds": seconds, "peak_gb": round(gigabytes, 1)}
        # Out of the handler: the error holds on to the model.
        gc.collect()
        torch.cuda.empty_cache()
    raise ValueError("a batch of one must fit into the device's memory; choose a smaller --model")


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="transformer_xl", help="of conf/model (default: transformer_xl)")
    parser.add_argument("--batch", type=int, default=64, help="largest batch that is tried (default: 64)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps (default: 10)")
    default = Path("runs/bench/gpu.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    require_int("--rounds", options.rounds, at_least=1)
    require_int("--batch", options.batch, at_least=1)
    if not torch.cuda.is_available():
        raise ValueError("this benchmark must run on a CUDA device, got none; make bench-transformer is for CPUs")
    rate = matmul_rate(CUDA, torch.bfloat16, side=8192, repeats=20)
    paper = model_config(options.model)
    rows: Rows = [{"device": torch.cuda.get_device_name(), "matmul_teraflops": round(rate / 1e12)}]
    speeds: dict[tuple[str, bool], float] = {}
    for pattern, config in (("paper", paper), ("full", replace(paper, attention="full"))):
        for recompute in (False, True):
            row = fitting_batch(config, options.batch, recompute=recompute, rounds=options.rounds)
            samples = row["batch"] / row["seconds"]
            speeds[pattern, recompute] = samples
            rows.append(
                {
                    "model": options.model,
                    "attention": pattern,
                    "checkpointing": recompute,
                    **row,
                    "tokens_per_second": round(samples * config.layout.n_states),
                    "mfu": round(3 * count_flops(config).total * samples / rate, 3),
                }
            )
            gc.collect()
            torch.cuda.empty_cache()
    ratios = {
        "paper_over_full": round(speeds["paper", False] / speeds["full", False], 2),
        "paper_over_full_checkpointing": round(speeds["paper", True] / speeds["full", True], 2),
        "mfu": max(row.get("mfu", 0.0) for row in rows),
    }
    write_report(options.out, rows, ratios)
    print_tables(options.out, rows[:1], rows[1:], [ratios])


if __name__ == "__main__":
    main()
