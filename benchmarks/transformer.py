"""Speed and memory of a training step of our transformer against DALLE-pytorch's: `make bench-transformer`.

Both have 8 layers in the paper's order of patterns, width 512, 8 heads of 64, 256 + 1024 tokens, vocabularies of 16,384
and 8,192, fp32, and the same number of weights: its MLPs have a gate and with it half as many weights again as the
paper's, so ours are made 6 instead of 4 times as wide as the stream (a row of its own shows 4). A step is forward,
backward, clipping and the optimizer, each as its own training does it. Steps are timed in turns, each side in a process
of its own, the average of the weights and the paper's clipped variance, which theirs has not, left out. Times are those
of each side's fastest step: what else the machine does can only add to them. Theirs comes with the defaults of its
class, and without rotary embeddings and shifted tokens; ratios are to the faster one. Glibc's allocator is set for both
alike: with glibc told to keep freed memory for both ("tuned"), and as it is for both ("default"). In the latter case a
row of its own shows ours as `train.py` runs it, which tells glibc so by itself.

Writes `transformer.json` (command, machine, date, rows, ratios).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dalle1  # noqa: F401 - before torch, so that threads of both sides wait as they do in training

# isort: split
import peer_transformer
import torch
from measure import TUNED_ALLOCATOR, Rows, machine, print_tables, time_in_turns, write_report
from our_transformer import make_step, random_tokens

from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.models.accounting import count_flops
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.training.allocator import keep_freed_memory
from dalle1.training.throughput import matmul_rate

OURS, OURS_AS_TRAINED, OURS_PAPER, PEER, PEER_PLAIN = (
    "ours",
    "ours, as train.py runs it",
    "ours, MLPs as in the paper",
    "DALLE-pytorch",
    "DALLE-pytorch, no rotary or shift",
)
GIVEN: dict[str, Any] = {"d_model": 512, "n_layers": 8, "n_heads": 8}
# As many weights as the peer's gated MLPs have, and what the paper has.
EQUAL, PAPER = TransformerConfig(**GIVEN, mlp_ratio=6), TransformerConfig(**GIVEN)


def our_step(config: TransformerConfig, batch: int) -> Callable[[], float]:
    """One update of ours."""
    torch.manual_seed(0)
    step = make_step(DalleTransformer(config), batch)
    return lambda: float(step())


def our_step_as_trained(config: TransformerConfig, batch: int) -> Callable[[], float]:
    """The same in a process that keeps its memory, as `train.py` makes it."""
    keep_freed_memory()
    return our_step(config, batch)


def build_peer(config: TransformerConfig, plain: bool = False) -> Any:
    """The peer in the sizes of `config`."""
    return peer_transformer.build(
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        text_vocab_size=config.text_vocab_size,
        text_seq_len=config.text_seq_len,
        image_vocab_size=config.image_vocab_size,
        grid_size=config.grid_height,
        patterns=config.layer_patterns,
        plain=plain,
    )


def peer_step(config: TransformerConfig, batch: int, plain: bool) -> Callable[[], float]:
    """One update of the peer."""
    torch.manual_seed(0)
    return partial(peer_transformer.Trainer(build_peer(config, plain)).update, *random_tokens(config, batch))


def compare(batch: int, *, allocator: str, rounds: int, rate: float) -> Rows:
    """One row for each side; `rate` is the machine's, in operations per second."""
    environment = TUNED_ALLOCATOR if allocator == "tuned" else {}
    makers: dict[str, tuple[Callable[..., Callable[[], Any]], tuple[Any, ...]]] = {
        OURS: (our_step, (EQUAL, batch)),
        OURS_PAPER: (our_step, (PAPER, batch)),
        PEER: (peer_step, (EQUAL, batch, False)),
        PEER_PLAIN: (peer_step, (EQUAL, batch, True)),
    }
    if allocator == "default":
        makers[OURS_AS_TRAINED] = (our_step_as_trained, (EQUAL, batch))
    title = f"batch {batch}, {allocator} allocator"
    results = time_in_turns(makers, rounds=rounds, environment=environment, title=title)
    rows: Rows = []
    for side, (seconds, gigabytes) in results.items():
        row: dict[str, Any] = {
            "batch": batch,
            "allocator": allocator,
            "side": side,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(batch * EQUAL.layout.n_states / seconds),
            "peak_gb": round(gigabytes, 2),
        }
        if side not in (PEER, PEER_PLAIN):
            flops = 3 * count_flops(PAPER if side == OURS_PAPER else EQUAL).total
            row["mfu"] = round(flops * batch / seconds / rate, 3)
        rows.append(row)
    return rows


def ratios_of(rows: Rows) -> dict[str, float]:
    """Ours against theirs: times as many tokens per second, and share of the memory."""
    of = {(row["allocator"], row["batch"], row["side"]): row for row in rows}
    ratios = {}
    for (allocator, batch, side), row in of.items():
        name = {OURS: f"{allocator}_b{batch}", OURS_AS_TRAINED: f"as_trained_b{batch}"}.get(side)
        if name:
            peers = [of[allocator, batch, peer] for peer in (PEER, PEER_PLAIN)]
            ratios[name] = round(min(peer["seconds"] for peer in peers) / row["seconds"], 2)
            if name == "default_b2":
                ratios["memory_b2"] = round(row["peak_gb"] / min(peer["peak_gb"] for peer in peers), 2)
            if name == "tuned_b2":
                ratios["mfu"] = row["mfu"]
    return ratios


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side (default: 5)")
    default = Path("runs/bench/transformer.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    require_int("--rounds", options.rounds, at_least=1)
    with torch.device("meta"):
        sizes = {OURS: DalleTransformer(EQUAL), OURS_PAPER: DalleTransformer(PAPER)}
    weights: Rows = [{"side": side, "weights": peer_transformer.count_parameters(net)} for side, net in sizes.items()]
    weights.append({"side": PEER, "weights": peer_transformer.count_parameters(build_peer(EQUAL))})
    rate = matmul_rate(torch.device("cpu"), torch.float32, side=2048, repeats=20)
    rates = [{"matmul_gflops": round(rate / 1e9)}]
    rows: Rows = []
    for batch, allocator in ((2, "tuned"), (2, "default"), (4, "default")):
        rows += compare(batch, allocator=allocator, rounds=options.rounds, rate=rate)
        # After each, for what comes next takes long.
        write_report(options.out, rows, ratios_of(rows), weights=weights, matmul=rates)
    print(machine())
    print_tables(options.out, weights, rates, rows, [ratios_of(rows)])


if __name__ == "__main__":
    main()
