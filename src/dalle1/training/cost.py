"""What training a transformer costs on some GPUs: memory, communication, time; pure arithmetic.

Two ways to use several devices are counted: DDP, in which every device has all weights and their state, and FSDP
("fully sharded": every device has a part of each, a block's weights are gathered when they are needed, the next block's
meanwhile; see `training.sharding`).

Not counted: the dVAE that makes the image tokens, scratch of single operations but the heads', what CUDA and NCCL take
for themselves, what the allocator cannot use. All parts are added up, though gradients appear while activations go.
"""

import math
from dataclasses import asdict, dataclass, replace

from dalle1.models.accounting import Weights, count_activations, count_flops, count_head_scratch
from dalle1.models.options import AttentionBackend, check_field_types
from dalle1.models.transformer import TransformerConfig

_FP32 = 4  # bytes: weights, gradients, Adam's two moments and the average are all kept in it


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One GPU, and how well it is used."""

    gpu_gigabytes: float  # memory, in 10^9 bytes
    teraflops: float  # 10^12 operations per second in dense matrix products of the type that training multiplies in
    mfu: float  # share of them that goes into what the model's definition asks for, in (0, 1]

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("gpu_gigabytes", "teraflops"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"plan.{name} must be a finite number > 0, got {getattr(self, name)}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"plan.mfu must be in (0, 1], got {self.mfu}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What of a run decides its cost."""

    model: TransformerConfig
    weights: Weights
    devices: int  # on all nodes
    batch_size: int  # samples per device and backward pass
    passes: int  # backward passes whose gradients are accumulated into one update
    backend: AttentionBackend  # not `auto`
    mixed: bool  # blocks multiply in 16 bits
    has_average: bool  # of the weights
    handed_bytes: int  # that DDP hands to the network in an update, see `training.communication`
    kept_bytes: int  # that this way to send keeps from update to update

    @property
    def global_batch(self) -> int:
        """Samples per update."""
        return self.devices * self.batch_size * self.passes

    @property
    def flops_per_sample(self) -> int:
        """Operations of the forward and the backward pass, without recomputation."""
        return 3 * count_flops(self.model).total

    @property
    def _compute_bytes(self) -> int:
        return 2 if self.mixed else 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gathered_weights: int  # FSDP: of two blocks in the type of matrix products; embeddings and heads in fp32
    gradients: int
    buckets: int  # DDP: copies of the gradients that are sent
    unsent: int  # DDP: what has not been sent yet, if gradients are compressed
    moments: int  # Adam's
    average: int
    activations: int  # see `models.accounting`
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


def count_memory(training: Training, *, sharded: bool, recompute: bool) -> Memory:
    """Bytes that one device needs.

    Args:
        training: The run.
        sharded: FSDP over all devices; else DDP, or on one device neither.
        recompute: With activation checkpointing.
    """
    weights, n = training.weights, training.devices
    activations = count_activations(
        training.model, training.batch_size, backend=training.backend, mixed=training.mixed, recompute=recompute
    )
    share = -(-_FP32 * weights.total // n) if sharded else _FP32 * weights.total
    block, ends = weights.blocks // training.model.n_layers, weights.embeddings + weights.heads
    # FSDP gathers in 16 bits if blocks multiply in them: no other copies are needed.
    kept = activations.total - (activations.weight_copies if sharded else 0)
    return Memory(
        weights=share,
        gathered_weights=training._compute_bytes * 2 * block + _FP32 * ends if sharded else 0,
        # A block's gradient is whole until it is sent; those of embeddings and heads are to the end.
        gradients=share + (_FP32 * (block + ends) if sharded else 0),
        buckets=_FP32 * weights.total if n > 1 and not sharded else 0,
        unsent=training.kept_bytes if n > 1 and not sharded else 0,
        moments=2 * share,
        average=share if training.has_average else 0,
        activations=kept,
        logits=count_head_scratch(training.model, training.batch_size, "cuda"),
    )


def largest_batch(training: Training, gigabytes: float, *, sharded: bool, recompute: bool) -> int:
    """Samples per device and backward pass that fit into `gigabytes` of 10^9 bytes; 0 if not even one does."""

    def fits(batch_size: int) -> bool:
        memory = count_memory(replace(training, batch_size=batch_size), sharded=sharded, recompute=recompute)
        return memory.total <= gigabytes * 1e9

    too_many = 1
    while fits(too_many):
        too_many *= 2
    most = too_many // 2
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most


def count_communication(training: Training, *, sharded: bool) -> int:
    """Bytes that each device sends in one update, by ring algorithms.

    DDP all-reduces the gradients, or what `communication` makes of them, once per update. FSDP gathers the blocks'
    weights twice in each pass, for the forward and for the backward pass, the others once, in fp32, and reduces and
    scatters the gradients, in fp32."""
    n, weights = training.devices, training.weights
    gathered = 2 * training._compute_bytes * weights.blocks + _FP32 * (weights.embeddings + weights.heads)
    fsdp = training.passes * (gathered + _FP32 * weights.total)
    return (fsdp if sharded else 2 * training.handed_bytes) * (n - 1) // n


def count_seconds(training: Training, hardware: Hardware, samples: int) -> float:
    """Time to train on so many samples."""
    rate = training.devices * hardware.teraflops * 1e12 * hardware.mfu
    return samples * training.flops_per_sample / rate
