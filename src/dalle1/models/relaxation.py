"""The relaxation between the dVAE's encoder and decoder, without the tensors that it does not need.

At each grid position: logits over the codes, their KL divergence to uniform, Gumbel noise, a softmax at a temperature,
and the mixture of code vectors that it weighs. With 8192 codes the maps in between are the largest tensors of the
whole dVAE; written as separate operations autograd keeps six of them. Here positions are handled in chunks that
stay in the cache, and two maps are kept for the backward pass: the relaxed codes and the KL's gradient.

Everything is in fp32 (or fp64, if the inputs are) whatever the precision around it: paper, app. A.2.
Shapes: n positions, v codes, c feature channels, d width of the code vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one chunk's map over the codes. On a CPU 16 MB, which stay in the cache between the passes over them;
# on a GPU 256 MB, enough that no kernel is small.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


def gumbel_noise(logits: Float[Tensor, "*positions v"], generator: torch.Generator | None = None) -> Tensor:
    """Gumbel noise of the logits' shape, drawn in fp32 or better: half precision has a thousand distinct values."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # The bounds keep away 0 and 1, where the double logarithm is infinite.
    noise = torch.empty_like(logits, dtype=dtype).uniform_(1e-20, 1 - 2**-24, generator=generator)
    return noise.log_().neg_().log_().neg_()


def relaxed_codes(
    features: Float[Tensor, "*positions c"],
    head_weight: Float[Tensor, "v c"],
    head_bias: Float[Tensor, " v"],
    codebook: Float[Tensor, "v d"],
    *,
    temperature: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> tuple[Float[Tensor, "*positions d"], Float[Tensor, "*positions"]]:
    """Relaxed code vectors softmax((logits + Gumbel noise) / temperature) @ codebook, and the logits' KL to uniform.

    The KL is ln v minus the entropy of softmax(logits), in [0, ln v]: of the raw logits, whatever the temperature
    (paper's first author, openai/DALL-E issue 26). The noise is new in every call. With one generator for each sample
    of the first axis, a sample's noise does not depend on the others.

    Raises: ValueError unless temperature > 0, and unless there are as many generators as samples, if there are several.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if isinstance(generator, Sequence) and len(generator) != len(features):
        raise ValueError(f"there must be a generator for each of the {len(features)} samples, got {len(generator)}")
    per_sample = math.prod(features.shape[1:-1])
    dtype = torch.promote_types(features.dtype, torch.float32)
    inputs = [tensor.to(dtype) for tensor in (features.flatten(0, -2), head_weight, head_bias, codebook)]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    with torch.autocast(features.device.type, enabled=False):
        # torch has no types for `apply`.
        vectors, kl = _RelaxedCodes.apply(*inputs, temperature, generator, per_sample, keep)  # type: ignore[no-untyped-call]
    return vectors.view(*features.shape[:-1], -1), kl.view(features.shape[:-1])


def most_likely_codes(
    features: Float[Tensor, "*positions c"], head_weight: Float[Tensor, "v c"], head_bias: Float[Tensor, " v"]
) -> Int[Tensor, "*positions"]:
    """The argmax of the logits, of which only one chunk exists at a time; no gradient."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    flat = features.detach().flatten(0, -2).to(dtype)
    weight, bias = head_weight.detach().to(dtype).t(), head_bias.detach().to(dtype)
    with torch.autocast(features.device.type, enabled=False):
        chunks = [torch.addmm(bias, flat[rows], weight).argmax(-1) for rows in _chunks(flat, len(bias), per_sample=1)]
    return torch.cat(chunks).view(features.shape[:-1])


def _chunks(positions: Tensor, n_codes: int, *, per_sample: int) -> Iterator[slice]:
    """Slices of all positions, in order: of whole samples, or of parts of one that begin where the sample does."""
    rows = max(1, _CHUNK_ELEMENTS.get(positions.device.type, 2**26) // n_codes)
    unit = rows // per_sample * per_sample or per_sample
    for first in range(0, len(positions), unit):
        last = min(first + unit, len(positions))
        yield from (slice(start, min(start + rows, last)) for start in range(first, last, rows))


def _add_noise(
    logits: Tensor, first: int, per_sample: int, generator: torch.Generator | Sequence[torch.Generator] | None
) -> None:
    """Add Gumbel noise to the logits of the positions from `first` on, a sample's from its own generator."""
    if not isinstance(generator, Sequence):
        logits.add_(gumbel_noise(logits, generator))
        return
    start, end = first, first + len(logits)
    while start < end:
        sample = start // per_sample
        stop = min((sample + 1) * per_sample, end)
        part = logits[start - first : stop - first]
        part.add_(gumbel_noise(part, generator[sample]))
        start = stop


class _RelaxedCodes(torch.autograd.Function):
    """See `relaxed_codes`."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
        codebook: Tensor,
        temperature: float,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        per_sample: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        vectors = features.new_empty(len(features), codebook.shape[1])
        kl = features.new_empty(len(features))
        kept: list[Tensor] = []
        for rows in _chunks(features, len(head_bias), per_sample=per_sample):
            logits = torch.addmm(head_bias, features[rows], head_weight.t())
            # The likeliest code's is then 0, and the denominator of the softmax 1 / its probability.
            logits -= logits.amax(-1, keepdim=True)
            probs = torch.softmax(logits, -1)
            kl_slope = probs * logits
            mean_logit = kl_slope.sum(-1, keepdim=True)
            kl[rows] = mean_logit[:, 0] + probs.amax(-1).log() + math.log(len(head_bias))
            if keep:
                # d KL / d logits = p (ln p + entropy) = p (logits - mean logit)
                kl_slope.addcmul_(probs, mean_logit, value=-1)
            _add_noise(logits, rows.start, per_sample, generator)
            codes = logits.div_(temperature)
            torch.softmax(codes, -1, out=codes)
            torch.mm(codes, codebook, out=vectors[rows])
            if keep:
                kept += [codes, kl_slope]
        ctx.temperature, ctx.per_sample = temperature, per_sample
        ctx.save_for_backward(features, head_weight, codebook, *kept)
        return vectors, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        vectors_gradient, kl_gradient = gradients
        features, head_weight, codebook, *kept = ctx.saved_tensors
        with torch.autocast(features.device.type, enabled=False):
            d_features = torch.empty_like(features)
            d_weight, d_bias = torch.zeros_like(head_weight), head_weight.new_zeros(len(head_weight))
            d_codebook = torch.zeros_like(codebook)
            for i, rows in enumerate(_chunks(features, len(codebook), per_sample=ctx.per_sample)):
                codes, kl_slope = kept[2 * i : 2 * i + 2]
                d_vectors = vectors_gradient[rows]
                d_codebook.addmm_(codes.t(), d_vectors)
                # Of a softmax: y (dy - y.dy), and dy divided by the temperature.
                d_logits = torch.mm(d_vectors / ctx.temperature, codebook.t()).mul_(codes)
                d_logits.addcmul_(codes, d_logits.sum(-1, keepdim=True), value=-1)
                d_logits.addcmul_(kl_slope, kl_gradient[rows, None])
                torch.mm(d_logits, head_weight, out=d_features[rows])
                d_weight.addmm_(d_logits.t(), features[rows])
                d_bias += d_logits.sum(0)
        return d_features, d_weight, d_bias, d_codebook, None, None, None, None
