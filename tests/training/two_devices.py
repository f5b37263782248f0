"""One of two processes that train a small network under DDP with PowerSGD, stop, and go on from what they have saved.

`python two_devices.py RANK DIRECTORY` writes `rank<rank>.json`: hashes of what a whole run and a resumed one end with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dalle1.checkpoint import weights_sha256
from dalle1.training.communication import average_bucket
from dalle1.training.powersgd import PowerSGD, PowerSGDReducer
from dalle1.training.powersgd_files import load_state, save_state

CONFIG = PowerSGD(rank=4, shards=2, fixed_q=False, factors="bf16")


class Run:
    """A network, its optimizer, and DDP around it."""

    def __init__(self, rank: int) -> None:
        torch.manual_seed(0)
        blocks = nn.Sequential(nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 16), nn.Tanh())
        self.rank = rank
        self.network = nn.Sequential()
        self.network.add_module("blocks", blocks)
        self.network.add_module("head", nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2)
        self.reducer = PowerSGDReducer(CONFIG, self.network, seed=0)
        # So small that there are several, which DDP puts together anew after the first pass.
        self.wrapped = DistributedDataParallel(self.network, bucket_cap_mb=0.001)
        self.wrapped.register_comm_hook(self.reducer, average_bucket)

    def train(self, first: int, end: int) -> None:
        for step in range(first, end):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + self.rank))
            self.wrapped(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def hashes(self) -> dict[str, str]:
        return {
            "weights": weights_sha256(self.network.state_dict()),
            "errors": weights_sha256(self.reducer.errors()),
            "queries": weights_sha256(self.reducer.queries()),
        }


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), 2), rank=rank, world_size=2)
    whole = Run(rank)
    whole.train(0, 4)
    errors, queries = whole.reducer.errors(), whole.reducer.queries()
    save_state(directory, step=4, rank=rank, world_size=2, errors=errors, queries=queries)
    saved = {"network": whole.network.state_dict(), "optimizer": whole.optimizer.state_dict()}
    torch.save(saved, directory / f"rank{rank}.ckpt")
    whole.train(4, 7)

    resumed = Run(rank)
    saved = torch.load(directory / f"rank{rank}.ckpt", weights_only=True)
    resumed.network.load_state_dict(saved["network"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    state = load_state(directory, step=4, rank=rank, world_size=2)
    assert state is not None
    resumed.reducer.load(*state)
    resumed.train(4, 7)

    sent = {"sent": whole.reducer.sent_bytes, "plain": whole.reducer.plain_bytes}
    content = {"whole": whole.hashes(), "resumed": resumed.hashes(), **sent}
    (directory / f"rank{rank}.json").write_text(json.dumps(content))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
