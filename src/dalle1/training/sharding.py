"""Networks too large for one device: weights, gradients, moments and average in parts, one for each device (FSDP2).

A block's weights are gathered when it is needed, and given up again; see docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_dtensor

from dalle1.checkpoint import EMA_KEY
from dalle1.models.transformer import Block, DalleTransformer
from dalle1.sharded_files import is_sharded, read_sharded
from dalle1.training.checkpoints import LAST, AtomicCheckpointIO
from dalle1.training.disk_full import describe_full_disk, is_disk_full
from dalle1.training.ranks import RankLauncher, check_timeout
from dalle1.training.sharded_checkpoints import point_to, together, write_sharded


class FullyShardedStrategy(ModelParallelStrategy):
    """Every device keeps a part of each weight and of all that belongs to it; their results are those of DDP.

    Weights, gradients, moments and the average stay in fp32. With bf16-mixed a block's weights travel in bf16, which is
    what its matrix products round them to anyway; gradients are averaged in fp32, as under DDP.
    """

    def __init__(self, *, timeout_minutes: float) -> None:
        """Shard over all devices of all nodes.

        Args:
            timeout_minutes: As of `ranks.DDP`.

        Raises: ValueError for another `timeout_minutes`.
        """
        super().__init__(tensor_parallel_size=1, timeout=check_timeout(timeout_minutes))

    # In this order, as without sharding: load weights, then give the optimizer its state.
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def setup_environment(self) -> None:
        """Start the processes' group; Lightning itself would shard within a node only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None, "Lightning has chosen one"
        self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def shard(self, network: DalleTransformer) -> None:
        """Shard `network` in place, once; all devices begin with the first one's weights."""
        if not isinstance(network, FSDPModule):
            mixed = str(self.precision_plugin.precision).startswith("bf16")
            shard_network(network, self.device_mesh["data_parallel"], self.root_device, mixed=mixed)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a directory `step<update>.ckpt`, and make `filepath`, beside it, another name of it.

        Of another one than `last.ckpt` it is `best-step<update>.ckpt`, which goes when that names another one.

        All devices must call this together. A full disk is told as `AtomicCheckpointIO` tells it.

        Raises: OSError on all of them if one cannot write for another reason.
        """
        path = Path(self.broadcast(filepath))
        own = "" if path.name == LAST else f"{path.stem}-"
        directory = path.with_name(f"{own}step{checkpoint['global_step']:07d}.ckpt")
        teller = self.checkpoint_io
        assert isinstance(teller, AtomicCheckpointIO), "every trainer of ours has one"
        teller.failure = None
        try:
            write_sharded(directory, checkpoint)
            together(lambda: point_to(path, directory) if self.is_global_zero else None)
        except (OSError, RuntimeError) as error:
            if not is_disk_full(error):
                raise
            teller.failure = describe_full_disk(directory, checkpoint)
            return

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, in parts or not, of any number of devices: of its tensors each device gets its part."""
        path, mesh = Path(self.broadcast(checkpoint_path)), self.device_mesh["data_parallel"]
        if is_sharded(path):
            return read_sharded(path, make_empty=partial(_empty_part, mesh))
        # Mapped, not read: every process needs but a part.
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name in ("state_dict", EMA_KEY, "optimizer_states"):
            content[name] = _distribute(content[name], mesh)
        return content

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The parts that this device has."""
        if self.lightning_module is not None:
            forget_gathered(self.lightning_module)
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Set them."""
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The parts of the moments that this device has."""
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Set them."""
        Strategy.load_optimizer_state_dict(self, checkpoint)


def shard_network(network: DalleTransformer, mesh: DeviceMesh, device: torch.device, *, mixed: bool) -> None:
    """Shard a network in place: each block, then the rest.

    Args:
        network: With its numbers on the first device of `mesh`; elsewhere it may be on the meta device.
        mesh: One dimension; all its devices must call this together.
        device: That of this process.
        mixed: Blocks multiply in bf16, so they are gathered in it.
    """
    # What enters a block stays as it is: the identity path is fp32 under autocast too.
    in_blocks = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in cast("Iterable[Block]", network.blocks):
        _take_from_first(block, device)
        fully_shard(block, mesh=mesh, mp_policy=in_blocks)
    _take_from_first(network, device)
    fully_shard(network, mesh=mesh)
    register_fsdp_forward_method(network, "losses")


def _take_from_first(part: nn.Module, device: torch.device) -> None:
    """Put what of `part` is not sharded yet on this device, with the first device's numbers."""
    for module in part.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                continue
            assert torch.distributed.get_rank() or not weight.is_meta, "the first device has all numbers"
            whole = torch.empty_like(weight.data, device=device) if weight.is_meta else weight.data.to(device)
            torch.distributed.broadcast(whole, src=0)
            setattr(module, name, nn.Parameter(whole, requires_grad=weight.requires_grad))


def _empty_part(mesh: DeviceMesh, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor sharded as `fully_shard` does it."""
    return empty_dtensor(*size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])


def _distribute(value: Any, mesh: DeviceMesh) -> Any:
    """`value` with all tensors in it sharded, but for single numbers, such as the optimizer's count of steps."""
    if isinstance(value, Tensor) and value.ndim:
        return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
    if isinstance(value, dict):
        return {name: _distribute(each, mesh) for name, each in value.items()}
    if isinstance(value, list):
        return [_distribute(each, mesh) for each in value]
    return value


def in_whole(tensor: Tensor) -> Tensor:
    """A tensor of which each device may have a part, on all of them; all must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def forget_gathered(pl_module: pl.LightningModule) -> None:
    """Give up what is gathered; after a forward pass without a backward pass that is so, and weights are whole.

    Only parts may be changed: the next forward pass would not see what becomes of them.
    """
    if isinstance(pl_module.model, FSDPModule):
        pl_module.model.reshard()


@contextmanager
def whole_network(pl_module: pl.LightningModule, is_wanted: bool) -> Iterator[None]:
    """Where `is_wanted`, a module whose network is sharded has it in whole meanwhile, a copy with the present weights.

    All devices must begin this together: each gives its parts. A network that is not sharded stays as it is.
    """
    network = pl_module.model
    if not isinstance(network, FSDPModule):
        yield
        return
    assert isinstance(network, DalleTransformer), "no other network is sharded"
    state: dict[str, Tensor] = {}
    for name, weight in network.state_dict().items():
        whole = in_whole(weight)
        if is_wanted:
            state[name] = whole
    if not is_wanted:
        yield
        return
    with torch.device("meta"):
        copy = DalleTransformer(network.config)
    copy.load_state_dict(state, assign=True)
    pl_module.model = copy.eval().requires_grad_(False)
    try:
        yield
    finally:
        pl_module.model = network
