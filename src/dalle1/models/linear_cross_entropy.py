"""Logits and their cross-entropy in one, for vocabularies whose logits are too many to keep."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropy:
    """What `linear_cross_entropy` gives for n tokens."""

    loss: Tensor  # (), sum of weights * nats; the rest has no gradient
    nats: Tensor  # (n,), fp32
    correct: Tensor  # (n,), bool: the target has the largest logit


def linear_cross_entropy(
    states: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"],
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
) -> LinearCrossEntropy:
    """Weighted cross-entropy, in nats, of the logits `states @ weight.T + bias`, which are never kept.

    Rows are worked on in chunks. A chunk's logits give its loss and at once its part of the gradients, so that the
    backward pass has nothing left to do but to scale them. Logits, softmax and sums are fp32; under mixed precision on
    CUDA the factors of the matrix products are rounded to 16 bits, as everywhere, but their results are not.
    """
    loss, nats, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, weight, bias, targets, weights, torch.is_grad_enabled()
    )
    return LinearCrossEntropy(loss=loss, nats=nats, correct=correct)


# Bytes of one chunk's logits: on a CPU small enough for its caches and for memory that is used again, on a GPU large
# enough to keep it busy.
_CHUNK_BYTES = {"cpu": 16 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20


def rows_per_chunk(classes: int, device_type: str) -> int:
    """Rows of fp32 logits that are worked on at once."""
    return max(1, _CHUNK_BYTES.get(device_type, _CHUNK_BYTES_ELSEWHERE) // (4 * classes))


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = states.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and device == "cuda" else None
        factor = weight if low is None else weight.to(low)  # rounded once, not for every chunk
        size = min(len(states), rows_per_chunk(len(weight), device))
        nats, correct, grads = [], [], []
        grad_weight = torch.zeros_like(weight, dtype=_precise(weight)) if with_gradient else None
        grad_bias = torch.zeros_like(bias, dtype=_precise(bias)) if with_gradient else None
        # All chunks write to the same memory: the first use of new memory is slow on a CPU.
        buffer = weight.new_empty(size, len(weight), dtype=_precise(weight)) if low is None else None
        with torch.autocast(device, enabled=False):
            for first in range(0, len(states), size):
                part = slice(first, first + size)
                x, target, token_weights = states[part], targets[part, None], weights[part, None]
                logits = _logits(x, factor, bias, low, buffer)
                right = logits.gather(1, target)
                correct.append(logits.argmax(1) == target[:, 0])
                log_probs = torch.log_softmax(logits, 1, out=logits)
                nats.append(-log_probs.gather(1, target)[:, 0])
                if grad_weight is not None and grad_bias is not None:
                    grad_logits = torch.exp(log_probs, out=log_probs)
                    grad_logits.scatter_add_(1, target, torch.full_like(right, -1))
                    # Weighted where rows are short.
                    grads.append((_matmul(grad_logits, factor, low) * token_weights).to(states.dtype))
                    _add_matmul(grad_weight, grad_logits.t(), x * token_weights, low)
                    grad_bias.addmv_(grad_logits.t(), token_weights[:, 0].to(grad_bias.dtype))
        all_nats = torch.cat(nats)
        if with_gradient:
            ctx.save_for_backward(torch.cat(grads), grad_weight, grad_bias)
        every_correct = torch.cat(correct)
        ctx.mark_non_differentiable(all_nats, every_correct)
        return (all_nats * weights).sum(), all_nats, every_correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias = ctx.saved_tensors
        return states * grad, weight.mul_(grad), bias.mul_(grad), None, None, None


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(x: Tensor, weight: Tensor, bias: Tensor, low: torch.dtype | None, buffer: Tensor | None) -> Tensor:
    """As `_matmul`, in `buffer` if there is one."""
    if buffer is None:
        return _matmul(x, weight.t(), low).add_(bias)
    return torch.addmm(bias.to(buffer.dtype), x.to(buffer.dtype), weight.t().to(buffer.dtype), out=buffer[: len(x)])


def _matmul(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    """The product a @ b in fp32 (fp64 for that), from factors rounded to `low` if given."""
    if low is None:
        dtype = torch.promote_types(_precise(a), b.dtype)
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a.to(low), b.to(low), out_dtype=torch.float32)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor, low: torch.dtype | None) -> None:
    """Add a @ b to `total`; as `_matmul`."""
    if low is None:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        total += _matmul(a, b, low)
