"""What devices send each other after a backward pass under DDP, and how much of it.

DDP hands the gradients over in buckets while the backward pass still runs. A `Reducer` turns a bucket into the mean
over all devices and counts what it gives to the network; `average_bucket` is the hook by which DDP calls it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket


@dataclass(frozen=True, kw_only=True)
class Communication:
    """How gradients travel. This one: as DDP itself sends them, in fp32."""

    def handed_bytes(self, name: str, shape: torch.Size) -> int:
        """What one device hands to the network in an update for the gradient of the weight `name`."""
        return 4 * shape.numel()

    def kept_bytes(self, name: str, shape: torch.Size) -> int:
        """What one device keeps from update to update to send that gradient."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Bf16(Communication):
    """Gradients are rounded to bf16, averaged in it, and go on in fp32: half the bytes."""

    def handed_bytes(self, name: str, shape: torch.Size) -> int:
        """Two for each weight."""
        return 2 * shape.numel()


class Reducer:
    """Averages buckets of gradients over all devices; subclasses say how.

    Attributes:
        sent_bytes: What this device has handed to all-reduce since the start.
        plain_bytes: What plain fp32 would have been. An algorithm of NCCL or gloo sends each byte about twice.
    """

    def __init__(self) -> None:
        self.sent_bytes = self.plain_bytes = 0
        self._stream: torch.cuda.Stream | None = None

    def reduce(self, bucket: GradBucket) -> None:
        """Replace the gradients in `bucket`, fp32, by what all devices go on with."""
        raise NotImplementedError

    def start_mean(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        """Begin to average `tensors` in one piece that travels as `dtype`; the result waits and gives means in fp32.

        All devices get the same bits. Divided before it is summed, so that a sum overflows only if the mean does."""
        if not tensors:
            return lambda: []
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        flat = flat.div_(dist.get_world_size()).to(dtype)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None, "every device is in the default group"
        self.sent_bytes += flat.numel() * flat.element_size()

        def finish() -> list[Tensor]:
            work.wait()
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            # Each in memory of its own: products may depend on where their factors lie, in the last bit.
            means = [part.to(torch.float32, copy=True) for part in parts]
            return [part.view(tensor.shape) for part, tensor in zip(means, tensors, strict=True)]

        return finish

    def run(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """`reduce`, on a CUDA device beside the backward pass, on one stream for all buckets.

        One after the other in DDP's order, which is that of all devices: callbacks that each begin another all-reduce
        would come in any order, and gloo would then add up what does not belong together."""
        device = bucket.buffer().device
        self.plain_bytes += 4 * bucket.buffer().numel()
        if device.type != "cuda":
            self.reduce(bucket)
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            self.reduce(bucket)
            done = torch.futures.Future(devices=[device])
            done.set_result(bucket.buffer())  # it makes those who wait for it wait for this stream
        return done


class Bf16Reducer(Reducer):
    """Averages whole buckets in bf16."""

    @torch.no_grad()
    def reduce(self, bucket: GradBucket) -> None:
        """Replace the gradients by their means."""
        (mean,) = self.start_mean([bucket.buffer()], torch.bfloat16)()
        bucket.buffer().copy_(mean)


# Without `from __future__ import annotations` in this file: DDP looks at the annotations.
def average_bucket(state: Reducer, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The hook for `DistributedDataParallel.register_comm_hook(reducer, average_bucket)`."""
    return state.run(bucket)


def handed_bytes(communication: Communication, network: nn.Module) -> int:
    """What one device hands to the network in an update; `network` may be on the meta device."""
    return sum(communication.handed_bytes(name, weight.shape) for name, weight in _trained(network))


def kept_bytes(communication: Communication, network: nn.Module) -> int:
    """What one device keeps from update to update to send less."""
    return sum(communication.kept_bytes(name, weight.shape) for name, weight in _trained(network))


def _trained(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
