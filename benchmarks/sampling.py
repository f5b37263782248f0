"""Speed of sampling against DALLE-pytorch 1.6.6, on a CPU in fp32: `make bench-sampling`.

Eight layers of width 512 in the paper's order of patterns, 256 + 1024 tokens, random weights; theirs is `DALLE` with
its defaults. Rows:

    ours                what `sample.py` runs, whole pictures
    as shipped          its `generate_images(use_cache=True)`, which drops the cache: every step computes everything
    cache repaired      the cache is handed on by hand, with `optimize_for_inference=True`, without which it is not read
    ... easiest layers  and a row in the place of the convolution, which it cannot cache

Theirs would take hours, so single steps are timed at the first, middle and last positions and the time of a picture is
the integral over the lines between them, without what it takes to read the text. Both draw from half of the codes,
theirs from half of both vocabularies. Every row runs in a process of its own, glibc's allocator as it is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import dalle1  # noqa: F401 - before torch, so that threads of both sides wait as they do in sampling

# isort: split
import peer_transformer
import torch
from measure import Rows, in_own_process, machine, print_tables, write_report
from our_transformer import random_tokens

from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.models.accounting import count_weights
from dalle1.models.kv_cache import count_slots
from dalle1.models.options import AttentionPattern
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.sampler import Block, OnStep, Sampler
from dalle1.training.throughput import matmul_rate

CONFIG = TransformerConfig(d_model=512, n_layers=8, n_heads=8, mlp_ratio=6)  # as many weights as theirs
SHIPPED, REPAIRED, EASIEST = "as shipped", "cache repaired", "cache repaired, easiest layers"
OURS = "ours"


def read_rate() -> float:
    """Bytes per second that all threads read from memory."""
    data = torch.ones(1 << 28)  # 1 GB, far beyond any cache
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.numel() * 4 / min(seconds)


def sample_ours(candidates: int) -> dict[str, float]:
    """Whole pictures; seconds in all, and of steps about positions 50 and 1000."""
    torch.manual_seed(0)
    model = _with_random_heads(DalleTransformer(CONFIG)).eval()
    text, _ = random_tokens(CONFIG, 1)
    seeds = [list(range(candidates))]
    half = SamplingConfig(top_k=CONFIG.image_vocab_size // 2)
    with suppress(_Enough):  # warm
        Sampler(model, half).sample(text, seeds=seeds, on_step=_stop_after(20))
    times = [time.perf_counter()]
    Sampler(model, half).sample(text, seeds=seeds, on_step=lambda _, __: times.append(time.perf_counter()))
    steps = [after - before for before, after in pairwise(times)]
    return {
        "seconds": times[-1] - times[0],
        "early": statistics.median(steps[40:60]),
        "late": statistics.median(steps[990:1010]),
    }


def _with_random_heads(model: DalleTransformer) -> DalleTransformer:
    torch.nn.init.normal_(model.image_head.weight, std=0.02)  # it starts at zero, where all codes are equal
    return model


class _Enough(Exception):
    pass


def _stop_after(steps: int) -> OnStep:
    left = iter(range(steps))

    def on_step(_: Block, __: int) -> None:
        if next(left, None) is None:
            raise _Enough

    return on_step


def sample_theirs(side: str, candidates: int, repeats: int) -> dict[str, float]:
    """Seconds of all pictures, from those of steps at three positions."""
    torch.manual_seed(0)
    easy: tuple[AttentionPattern, ...] = tuple("row" if each == "conv" else each for each in CONFIG.layer_patterns)
    model: Any = peer_transformer.build(
        d_model=CONFIG.d_model,
        n_layers=CONFIG.n_layers,
        n_heads=CONFIG.n_heads,
        text_vocab_size=CONFIG.text_vocab_size,
        text_seq_len=CONFIG.text_seq_len,
        image_vocab_size=CONFIG.image_vocab_size,
        grid_size=CONFIG.grid_height,
        patterns=easy if side == EASIEST else CONFIG.layer_patterns,
        cacheable=side != SHIPPED,
    ).eval()
    text, image = random_tokens(CONFIG, candidates)
    length = CONFIG.image_seq_len
    of_step: list[float] = []
    with torch.no_grad():
        for position in (1, length // 2, length - 1 - repeats):
            step = peer_transformer.sampling_step(model, text, image, position, cached=side != SHIPPED)
            seconds = []
            for _ in range(repeats + 1):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
            of_step.append(min(seconds[1:]))
    first, middle, last = of_step
    return {"seconds": length * (first + 2 * middle + last) / 4}


def row_of(side: str, candidates: int, result: dict[str, float], peak_gb: float) -> dict[str, Any]:
    """One line of the table."""
    return {
        "side": side,
        "candidates": candidates,
        "seconds_per_picture": round(result["seconds"] / candidates, 2),
        "tokens_per_second": round(candidates * CONFIG.image_seq_len / result["seconds"], 1),
        "peak_gb": round(peak_gb, 2),
    }


def cache_share(config: TransformerConfig) -> float:
    """What a candidate's cache takes of a dense one with the text in it."""
    slots = sum(count_slots(config.layout, pattern) for pattern in config.layer_patterns)
    return slots / (config.n_layers * (config.text_seq_len + config.image_seq_len))


def ours_of_machine(results: dict[int, dict[str, float]]) -> Rows:
    """Shares of what the machine reads and multiplies, in the steps at the end of a picture."""
    with torch.device("meta"):
        weights = count_weights(DalleTransformer(CONFIG)).blocks + CONFIG.d_model * CONFIG.image_vocab_size
    read, multiplied = read_rate(), matmul_rate(torch.device("cpu"), torch.float32, side=2048, repeats=20)
    rows: Rows = []
    for candidates, result in results.items():
        rows.append(
            {
                "candidates": candidates,
                "early_ms": round(1000 * result["early"], 2),
                "late_ms": round(1000 * result["late"], 2),
                "of_read_rate": round(4 * weights / result["late"] / read, 2),
                "of_matmul_rate": round(2 * weights * candidates / result["late"] / multiplied, 2),
            }
        )
    return rows


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of theirs at each position (default: 2)")
    default = Path("runs/bench/sampling.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    require_int("--repeats", options.repeats, at_least=1)
    rows: Rows = []
    seconds: dict[tuple[str, int], float] = {}
    ours: dict[int, dict[str, float]] = {}
    jobs = [(OURS, n) for n in (1, 8, 32)]
    jobs += [(side, n) for side in (SHIPPED, REPAIRED) for n in (1, 8)] + [(EASIEST, n) for n in (1, 8, 32)]
    for side, n in jobs:
        work = (sample_ours, n) if side == OURS else (sample_theirs, side, n, options.repeats)
        result, peak = in_own_process(*work)
        seconds[side, n] = result["seconds"]
        if side == OURS:
            ours[n] = result
        rows.append(row_of(side, n, result, peak))
        print(rows[-1], flush=True)
    ratios = {
        **{f"shipped_n{n}": round(seconds[SHIPPED, n] / seconds[OURS, n], 1) for n in (1, 8)},
        **{f"repaired_n{n}": round(seconds[EASIEST, n] / seconds[OURS, n], 2) for n in (1, 8, 32)},
        "kv_12b": round(cache_share(TransformerConfig()), 3),
        "late_over_early": round(ours[1]["late"] / ours[1]["early"], 3),
    }
    shares = ours_of_machine(ours)
    write_report(options.out, rows, ratios, shares=shares)
    print(machine())
    print_tables(options.out, rows, shares, [ratios])


if __name__ == "__main__":
    main()
