"""Memory of each device with DDP and with FSDP, beside what `dalle1.plan` says: `make bench-memory`.

Devices are processes on this CPU, in fp32. Each makes two updates of the network on random tokens, with gradient
clipping, AdamW and an average of the weights, as training does, sharded by what trains with `trainer=fsdp`. Memory is
the peak of a process's resident set in these updates, less what it had before the network was built; the largest of all
processes. Glibc is told to give freed memory back at once: what it would keep in pieces, several times the weights with
FSDP, is no memory that training needs, and a GPU's allocator is another. Sequences are short, so that weights and what
belongs to them is what counts.

Writes `memory.json` (command, machine, date, rows).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dalle1  # noqa: F401 - before torch, so that threads wait as they do in training

# isort: split
import torch
from hydra.utils import instantiate
from measure import Rows, configuration, machine, peak_gigabytes, print_tables, write_report
from our_transformer import make_step
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.models.transformer import DalleTransformer
from dalle1.plan import training_of
from dalle1.training.cost import count_memory
from dalle1.training.sharding import shard_network

# 12 layers of 768: 85 million weights in blocks, and small vocabularies.
OPTIONS = (
    *(
        "stage=transformer",
        "experiment=paper",
        "model=transformer_base",
        "text_vocab_size=1024",
        "image_vocab_size=1024",
    ),
    *("text_seq_len=32", "grid_size=8", "compute.attention_backend=local", "trainer.precision=32-true"),
)
UPDATES = 2  # from the second on there are moments
# Read when a process starts: larger pieces of memory come from the system, and go back to it.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}


class _Losses(nn.Module):
    """What DDP can call."""

    def __init__(self, network: DalleTransformer) -> None:
        super().__init__()
        self.network = network
        self._losses = network.losses

    def forward(self, *tokens: Tensor, **weights: Tensor) -> Any:
        return self._losses(*tokens, **weights)


def updates(rank: int, devices: int, sharded: bool, directory: str) -> float:
    """Peak in GB of one device; all devices call this together, with a directory to find each other in."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=devices)
    mesh = init_device_mesh("cpu", (devices,))
    distributed.all_reduce(torch.ones(1))
    before = _start_peak()
    torch.manual_seed(0)
    config = instantiate(configuration(*OPTIONS).model)
    with torch.device("meta" if sharded and rank else "cpu"):
        network = DalleTransformer(config)
    if sharded:
        shard_network(network, mesh, torch.device("cpu"), mixed=False)
    else:
        object.__setattr__(network, "losses", DistributedDataParallel(_Losses(network)))
    step = make_step(network, 1)
    average = [weight.detach().clone() for weight in network.parameters()]
    _start_peak()
    for _ in range(UPDATES):
        step()
        torch._foreach_lerp_(average, [weight.detach() for weight in network.parameters()], 0.01)
    peak = peak_gigabytes() - before
    distributed.barrier()
    distributed.destroy_process_group()
    return peak


def _start_peak() -> float:
    """Forget the peak so far, where Linux can; returns what it is now, in GB."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return peak_gigabytes()


def _work(results: Any, work: Callable[..., float], rank: int, *arguments: Any) -> None:
    results.put((rank, work(rank, *arguments)))


def measure(devices: int, *, sharded: bool) -> float:
    """The largest peak of all devices. Raises: RuntimeError if a process dies."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_work, args=(results, updates, rank, devices, sharded, directory))
            for rank in range(devices)
        ]
        before = dict(os.environ)
        os.environ.update(ALLOCATOR)
        try:
            for process in processes:
                process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a measuring process has died; its error is above")
    return max(results.get()[1] for _ in processes)


def compare(devices: int) -> Rows:
    """DDP and FSDP on so many devices."""
    rows: Rows = []
    training = training_of(configuration(*OPTIONS, f"trainer.devices={devices}", "optim.batch_size=1"))
    for sharded in (False, True):
        planned = count_memory(training, sharded=sharded, recompute=False).total / 1e9
        measured = measure(devices, sharded=sharded)
        rows.append(
            {
                "devices": devices,
                "way": "FSDP" if sharded else "DDP",
                "weights": training.weights.total,
                "GB per device": round(measured, 3),
                "plan": round(planned, 3),
                "measured / plan": round(measured / planned, 2),
            }
        )
    return rows


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4], help="numbers of processes (default: 2 4)")
    default = Path("runs/bench/memory.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    rows: Rows = []
    for devices in options.devices:
        require_int("--devices", devices, at_least=2)
    for devices in options.devices:
        rows += compare(devices)
        write_report(options.out, rows, {})
    print(machine())
    print_tables(options.out, rows)


if __name__ == "__main__":
    main()
