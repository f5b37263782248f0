"""Training and sampling steps of the transformer on one CUDA device: `make bench-gpu`.

`model=transformer_xl` in bf16, blocks compiled, with the largest batch of 64, 32, 16, ... that fits: tokens per second,
share of what the device reaches in plain bf16 matrix products, and peak memory; with and without activation
checkpointing, in the paper's patterns through FlexAttention and with full attention through PyTorch's flash kernels. A
step is forward, backward, clipping and the fused optimizer.

Before that, sampling in bf16 with 1, 8, 64 and 512 candidates of one text, the likeliest code each time: steps whose
kernels are launched one by one (`eager`, early in a picture, where they are fastest), as a CUDA graph, and as a graph
of compiled layers. With one candidate a step is bound by reading all weights: `of_read_rate` is their size over the
time of a step, as a share of what the device reads.

Writes `gpu.json` (command, machine, date, rows, ratios, sampling).
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
from our_transformer import make_step, random_tokens

from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.models.accounting import count_flops
from dalle1.models.decoding import Decoder, Decoding
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.training.throughput import matmul_rate

CUDA = torch.device("cuda")
CANDIDATES = (1, 8, 64, 512)
SIDES: dict[str, dict[str, bool]] = {"eager": {"static": False}, "graph": {}, "graph, compiled": {"compiled": True}}


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


def training_rows(name: str, largest: int, rate: float, *, rounds: int) -> tuple[Rows, dict[str, float]]:
    """A row for each kind of attention, with and without checkpointing, and their ratios."""
    rows: Rows = []
    speeds: dict[tuple[str, bool], float] = {}
    paper = model_config(name)
    for pattern, config in (("paper", paper), ("full", replace(paper, attention="full"))):
        for recompute in (False, True):
            row = fitting_batch(config, largest, recompute=recompute, rounds=rounds)
            samples = row["batch"] / row["seconds"]
            speeds[pattern, recompute] = samples
            rows.append(
                {
                    "model": name,
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
        "mfu": max(row["mfu"] for row in rows),
    }
    return rows, ratios


def read_rate() -> float:
    """Bytes per second that the device reads from its memory."""
    data = torch.ones(1 << 30, device=CUDA)  # 4 GB, far beyond any cache
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        data.sum()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return data.numel() * data.element_size() / min(seconds[1:])


@torch.inference_mode()
def time_sampling(decoder: Decoder, candidates: int, steps: int) -> float:
    """Mean seconds of a step after warming up."""
    config = decoder.model.config
    text, _ = random_tokens(config, 1)
    decoding = Decoding(decoder, [([decoder.prefill(text.to(CUDA))], candidates)])
    steps = min(steps, (config.image_seq_len - 1) // 2)
    for _ in range(steps):
        decoding.step(decoding.logits.argmax(-1))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        decoding.step(decoding.logits.argmax(-1))
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def step_bytes(decoder: Decoder) -> int:
    """Size of the weights that a step reads."""
    parts = (decoder.model.blocks, decoder.model.norm, decoder.model.image_head)
    return sum(weight.numel() * weight.element_size() for part in parts for weight in part.parameters())


def sampling_rows(name: str, *, steps: int) -> tuple[Rows, dict[str, float | None]]:
    """A row for each side and number of candidates, and ratios of those that fit into the memory."""
    rate, rows = read_rate(), Rows()
    seconds: dict[tuple[str, int], float] = {}
    torch.manual_seed(0)
    with CUDA:
        model = DalleTransformer(model_config(name)).eval()
    for candidates in CANDIDATES:
        for side, options in SIDES.items():
            torch._dynamo.reset()
            torch.cuda.reset_peak_memory_stats()
            decoder = Decoder(model, dtype=torch.bfloat16, **options)
            row: dict[str, Any] = {"model": name, "candidates": candidates, "steps": side}
            try:
                seconds[side, candidates] = took = time_sampling(decoder, candidates, steps)
            except torch.OutOfMemoryError:
                row["tokens_per_second"] = "out of memory"
            else:
                row["milliseconds"] = round(1000 * took, 3)
                row["tokens_per_second"] = round(candidates / took)
                row["of_read_rate"] = round(step_bytes(decoder) / took / rate, 3)
                row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
            rows.append(row)
            print(row, flush=True)
            del decoder
            gc.collect()
            torch.cuda.empty_cache()
    ratios: dict[str, float | None] = {"read_gigabytes_per_second": round(rate / 1e9)}
    for side in ("graph", "graph, compiled"):
        label = side.replace(", ", "_")
        for n in CANDIDATES:
            times = [seconds.get(key) for key in (("eager", n), (side, n))]
            ratios[f"{label}_over_eager_n{n}"] = round(times[0] / times[1], 2) if times[0] and times[1] else None
        ratios[f"{label}_of_read_rate_n1"] = next(
            (row.get("of_read_rate") for row in rows if (row["steps"], row["candidates"]) == (side, 1)), None
        )
    return rows, ratios


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="transformer_xl", help="of conf/model (default: transformer_xl)")
    parser.add_argument("--batch", type=int, default=64, help="largest batch that is tried (default: 64)")
    parser.add_argument("--rounds", type=int, default=10, help="timed training steps (default: 10)")
    parser.add_argument("--steps", type=int, default=200, help="timed sampling steps (default: 200)")
    default = Path("runs/bench/gpu.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    require_int("--rounds", options.rounds, at_least=1)
    require_int("--batch", options.batch, at_least=1)
    require_int("--steps", options.steps, at_least=1)
    if not torch.cuda.is_available():
        raise ValueError("this benchmark must run on a CUDA device, got none; make bench-transformer is for CPUs")
    rate = matmul_rate(CUDA, torch.bfloat16, side=8192, repeats=20)
    device = {"device": torch.cuda.get_device_name(), "matmul_teraflops": round(rate / 1e12)}
    sampling, of_sampling = sampling_rows(options.model, steps=options.steps)
    training, of_training = training_rows(options.model, options.batch, rate, rounds=options.rounds)
    ratios = {**of_training, **of_sampling}
    write_report(options.out, [device, *training], ratios, sampling=sampling)
    print_tables(options.out, [device], training, sampling, [of_training], [of_sampling])


if __name__ == "__main__":
    main()
