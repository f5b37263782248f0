"""PowerSGD (Vogels et al. 2019) as the paper has it (Ramesh et al. 2021, sec. 2.5, app. E): factors for gradients.

Every device keeps what it could not send in an error buffer, one for each compressed weight. With M = gradient + error,
an n x m matrix that is cut and turned as `Cut` says, and Q, m x r:

    P = mean over devices of M Q          n r numbers are sent
    P = orthonormal columns that span the same
    Q = mean over devices of M^T P        m r numbers
    gradient = P Q^T on all devices,  error = M - P Q^T on each

What has not arrived is in the next update's M. With a Q that stays, as the paper has it, the mean of the errors times Q
is 0: they add nothing to P, and arrive in as far as later gradients bring their directions.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from dalle1.models.options import check_field_types
from dalle1.training.communication import Communication, Reducer

# Smallest multiples of 128 with which the paper saw no gap in the loss, by width (app. E, table 1).
PAPER_RANKS = {1920: 512, 2688: 640, 3968: 896}
# What the paper adds to the diagonal before it orthogonalises, so that columns that are 0 or alike become directions
# too. Ours is a share of the largest element: the paper's gradients had a scale, ours may be of any size.
_DIAGONAL = 1e-6


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the gradient of one weight is seen while it is compressed: `pieces` matrices of `rows` x `columns`.

    `rows` <= `columns`, which makes the smaller factor the one that is orthogonalised, as in the paper."""

    pieces: int
    rows: int
    columns: int
    rank: int  # of each piece
    splits_inputs: bool  # pieces are slices of the weight's second axis
    is_turned: bool  # pieces are transposed

    @property
    def numbers_sent(self) -> int:
        """Of all pieces, both factors."""
        return self.pieces * self.rank * (self.rows + self.columns)

    def pieces_of(self, weight: Tensor) -> Tensor:
        """View of a weight or its gradient as (pieces, rows, columns)."""
        if self.splits_inputs:
            pieces = weight.view(weight.shape[0], self.pieces, -1).transpose(0, 1)
        else:
            pieces = weight.view(self.pieces, -1, weight.shape[1])
        return pieces.transpose(1, 2) if self.is_turned else pieces


@dataclass(frozen=True, kw_only=True)
class PowerSGD(Communication):
    """Which weights are compressed, and by how much."""

    # Columns of the factors of a whole matrix, over all its shards; null is the paper's for its widths, see
    # `default_rank`.
    rank: int | None = None
    # Each matrix is cut along its longer axis into so many parts, each with a rank / shards of its own: 8 is what the
    # GPUs of one of the paper's machines have. 1 compresses it as a whole, with less loss for as many bytes here.
    shards: int = 1
    fixed_q: bool = True  # Q is drawn once, as in the paper; false: Q is the last update's, as in PowerSGD itself
    factors: Literal["fp32", "bf16"] = "bf16"  # what P and Q travel in

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"communication.rank must be null or a whole number >= 1, got {self.rank!r}")
        if self.shards < 1:
            raise ValueError(f"communication.shards must be >= 1, got {self.shards}")

    def handed_bytes(self, name: str, shape: torch.Size) -> int:
        """Two factors, or the gradient in fp32."""
        cut = self.cut(name, shape)
        if cut is None:
            return super().handed_bytes(name, shape)
        return self.factor_type.itemsize * cut.numbers_sent

    def kept_bytes(self, name: str, shape: torch.Size) -> int:
        """An error buffer and Q, in fp32."""
        cut = self.cut(name, shape)
        return 0 if cut is None else 4 * (shape.numel() + cut.pieces * cut.columns * cut.rank)

    @property
    def factor_type(self) -> torch.dtype:
        """What P and Q travel in."""
        return torch.bfloat16 if self.factors == "bf16" else torch.float32

    def cut(self, name: str, shape: torch.Size) -> Cut | None:
        """How the weight `name` is compressed; None if its gradient travels as it is.

        That is so of everything but matrices in blocks (the paper's rule: embeddings, heads, gains and biases are not
        compressed), and of those whose factors would have as many numbers as they have."""
        if "blocks." not in name or len(shape) != 2:
            return None
        # Queries, keys and values are three matrices, of which ours are the rows of one.
        matrices = 3 if name.endswith("qkv.weight") else 1
        outputs, inputs = shape[0] // matrices, shape[1]
        splits_inputs = inputs > outputs
        parts = math.gcd(self.shards, max(outputs, inputs))
        rows, columns = (outputs, inputs // parts) if splits_inputs else (outputs // parts, inputs)
        rank = default_rank(min(outputs, inputs)) if self.rank is None else self.rank
        cut = Cut(
            pieces=parts * matrices,
            rows=min(rows, columns),
            columns=max(rows, columns),
            rank=min(-(-rank // parts), rows, columns),
            splits_inputs=splits_inputs,
            is_turned=rows > columns,
        )
        return cut if cut.numbers_sent < shape.numel() else None


def default_rank(width: int) -> int:
    """The paper's rank at its widths; elsewhere the same share of the width as at the next narrower one of them.

    Below all of them as at the narrowest, where the share is the largest: 512 of 1920."""
    like = max((each for each in PAPER_RANKS if each <= width), default=min(PAPER_RANKS))
    return -(-width * PAPER_RANKS[like] // like)


def draw_q(cut: Cut, seed: int, name: str) -> Tensor:
    """The first Q of a weight, standard normal (pieces, columns, rank): a function of (seed, name), on every device."""
    # 32 bits are all that PyTorch's CPU generator uses.
    digest = hashlib.sha256(f"powersgd|{seed}|{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randn(cut.pieces, cut.columns, cut.rank, generator=generator)


def orthogonalize(p: Tensor) -> Tensor:
    """Orthonormal columns, (pieces, rows, rank), that span those of `p`, by Householder reflections.

    Columns that are 0 become directions all the same; NaN or infinity makes a piece NaN."""
    largest = p.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    diagonal = _DIAGONAL * torch.eye(p.shape[1], p.shape[2], dtype=p.dtype, device=p.device)
    return torch.linalg.qr(p / largest + diagonal).Q


@dataclass(kw_only=True)
class _Compressed:
    """A weight whose gradient is compressed, and what is kept of it from update to update."""

    cut: Cut
    shape: torch.Size
    q: Tensor  # (pieces, columns, rank)
    error: Tensor  # (pieces, rows, columns), this device's
    scale: Tensor | None  # its gradient is this many times too large


class PowerSGDReducer(Reducer):
    """Averages gradients of matrices by their factors, others in fp32.

    The state belongs to weights, not to buckets, because DDP makes others after its first pass."""

    def __init__(
        self, config: PowerSGD, network: nn.Module, *, seed: int, scales: Mapping[nn.Parameter, Tensor] | None = None
    ) -> None:
        """Compress what `config` says of the weights of `network`.

        Args:
            config: The numbers.
            network: Its weights are where they will stay.
            seed: Decides Q.
            scales: How many times too large a weight's gradient is, of those that have a scale; the tensors may change.
        """
        super().__init__()
        self._config = config
        self._compressed: dict[str, _Compressed] = {}
        self._of_weight: dict[Tensor, _Compressed] = {}
        for name, weight in network.named_parameters():
            cut = config.cut(name, weight.shape) if weight.requires_grad else None
            if cut is not None:
                state = _Compressed(
                    cut=cut,
                    shape=weight.shape,
                    q=draw_q(cut, seed, name).to(weight.device),
                    error=torch.zeros(cut.pieces, cut.rows, cut.columns, device=weight.device),
                    scale=(scales or {}).get(weight),
                )
                self._compressed[name] = self._of_weight[weight] = state

    @torch.no_grad()
    def reduce(self, bucket: GradBucket) -> None:
        """Replace the gradients: those of matrices by what of them and of the errors has arrived, others by means."""
        pairs = [(self._of_weight.get(w), g) for w, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        plain = [gradient for weight, gradient in pairs if weight is None]
        finish_plain = self.start_mean(plain, torch.float32)
        self._reduce_matrices([(weight, gradient) for weight, gradient in pairs if weight is not None])
        for gradient, mean in zip(plain, finish_plain(), strict=True):
            gradient.copy_(mean)

    def _reduce_matrices(self, pairs: list[tuple[_Compressed, Tensor]]) -> None:
        weights = [weight for weight, _ in pairs]
        matrices = []
        for weight, gradient in pairs:
            pieces = weight.cut.pieces_of(gradient)
            # A copy: products may depend on where in a bucket a gradient lies, in the last bit.
            matrix = torch.empty_like(weight.error).copy_(pieces)
            if weight.scale is not None:
                matrix /= weight.scale
            matrices.append(matrix.add_(weight.error))
        products = [matrix @ weight.q for matrix, weight in zip(matrices, weights, strict=True)]
        ps = self.start_mean(products, self._config.factor_type)()
        bases = [orthogonalize(p) for p in ps]
        products = [matrix.mT @ basis for matrix, basis in zip(matrices, bases, strict=True)]
        qs = self.start_mean(products, self._config.factor_type)()
        for (weight, gradient), matrix, p, basis, q in zip(pairs, matrices, ps, bases, qs, strict=True):
            arrived = basis @ q.mT
            # The same on all devices, and not read here, which would wait for a GPU.
            is_finite = p.isfinite().all() & q.isfinite().all() & arrived.isfinite().all()
            self._keep_error(weight, matrix, arrived, is_finite)
            if not self._config.fixed_q:
                weight.q.copy_(torch.where(is_finite, q, weight.q))
            # Not finite anywhere: whoever looks at the gradient must see it.
            arrived = torch.where(is_finite, arrived, torch.nan)
            if weight.scale is not None:
                arrived *= weight.scale
            weight.cut.pieces_of(gradient).copy_(arrived)

    @staticmethod
    def _keep_error(weight: _Compressed, matrix: Tensor, arrived: Tensor, is_finite: Tensor) -> None:
        """What has not arrived; after an overflow nothing has, and what is not finite itself cannot be kept."""
        old = torch.where(weight.error.isfinite().all(), weight.error, 0.0)
        kept = torch.where(matrix.isfinite().all(), matrix, old)
        weight.error.copy_(torch.where(is_finite, matrix - arrived, kept))

    def errors(self) -> dict[str, Tensor]:
        """This device's error buffers by the names of their weights, in the weights' shapes, in the CPU's memory."""
        errors = {name: torch.empty(state.shape) for name, state in self._compressed.items()}
        for name, error in errors.items():
            state = self._compressed[name]
            state.cut.pieces_of(error).copy_(state.error)
        return errors

    def forget_errors(self) -> None:
        """Owe nothing: what an update that was thrown away has left here, or taken, must not come back."""
        for state in self._compressed.values():
            state.error.zero_()

    def queries(self) -> dict[str, Tensor]:
        """Qs that training has changed, by the names of the weights, (pieces, columns, rank)."""
        return {} if self._config.fixed_q else {name: state.q.cpu() for name, state in self._compressed.items()}

    def load(self, errors: Mapping[str, Tensor], queries: Mapping[str, Tensor]) -> None:
        """Go on from error buffers and Qs of an earlier start; those of other weights or shapes are left out."""
        for name, state in self._compressed.items():
            if name in errors and errors[name].shape == state.shape:
                state.error.copy_(state.cut.pieces_of(errors[name]))
            if not self._config.fixed_q and name in queries and queries[name].shape == state.q.shape:
                state.q.copy_(queries[name])
