"""Exact sparse attention through blocks: only keys near a query are multiplied, and no (s, s) matrix exists.

The image states are put into an order in which the keys of a query lie close together (raster for rows and
convolutions, column-major for columns) and cut into blocks of queries. A block attends to all of the text and to one
window of keys: itself and the few blocks before it. What the pattern forbids inside a window gets a score of -inf.
Both parts share one softmax.

Heads are worked on in groups whose scores fit into a processor's cache. The backward pass computes the scores again:
of a layer only queries, keys and values are kept. It runs on any device; it is what training on a CPU uses.

Shapes: b batch, s states, h heads, e head_dim; g heads of a group (b * h of them in all), p text states, n image
states filled up to whole blocks, c blocks, q queries of a block, w keys of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dalle1.models.attention_masks import StreamLayout
from dalle1.models.options import AttentionPattern

# Bytes of a group's scores: a part of a processor core's second-level cache and its share of the third; on a GPU,
# enough to keep it busy.
_GROUP_BYTES = {"cpu": 4 << 20}
_GROUP_BYTES_ELSEWHERE = 256 << 20
# Price of reading a key into a window, in multiply-adds of its scores: decides the size of the blocks. Fitted to
# measurements on an x86 CPU, where blocks of 32 are best for rows of 32 and of 96 for the paper's convolution.
_KEY_PRICE = 64
_BLOCK_SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Blocks:
    """How a pattern's image states are cut into blocks."""

    column_major: bool
    queries: int  # of a block
    window: int  # keys that a block sees, a multiple of `queries`: its own are the last ones
    count: int

    @property
    def cost(self) -> int:
        """Of one layer, in multiply-adds per unit of head_dim."""
        return self.count * (self.queries + _KEY_PRICE) * self.window


def choose_blocks(layout: StreamLayout, pattern: AttentionPattern) -> Blocks:
    """The cheapest order and size of blocks."""
    candidates = []
    for column_major in (False, True):
        mask = _ordered_mask(layout, pattern, column_major)
        if mask.triu(1).any():
            continue  # a key would come after its query, outside the window
        first_key = mask.int().argmax(dim=1)  # of each query
        line = layout.grid_height if column_major else layout.grid_width
        for queries in {min(size, len(mask)) for size in (*_BLOCK_SIZES, line)}:
            block_of_query = torch.arange(len(mask)) // queries
            reach = int((block_of_query - first_key // queries).max())
            count = -(-len(mask) // queries)
            candidates.append(Blocks(column_major, queries, (1 + reach) * queries, count))
    return min(candidates, key=lambda blocks: (blocks.cost, blocks.column_major))


def _ordered_mask(layout: StreamLayout, pattern: AttentionPattern, column_major: bool) -> Tensor:
    mask = layout.image_mask(pattern)
    if not column_major:
        return mask
    order = torch.tensor(layout.image_order(column_major=True))
    return mask[order][:, order]


class LocalAttention:
    """Attention of one pattern over a whole stream."""

    def __init__(self, layout: StreamLayout, pattern: AttentionPattern, device: torch.device) -> None:
        """Plan the blocks and make the tensors that describe them on `device`, where all calls must be."""
        self.blocks = blocks = choose_blocks(layout, pattern)
        self._text = layout.text_states
        self._order: Tensor | None = None
        if blocks.column_major:
            self._order = torch.tensor(layout.order(column_major=True), device=device)
        mask = _ordered_mask(layout, pattern, blocks.column_major)
        padded, before = blocks.count * blocks.queries, blocks.window - blocks.queries
        allowed = torch.zeros(padded, before + padded, dtype=torch.bool)
        allowed[: len(mask), before : before + len(mask)] = mask
        starts = range(0, padded, blocks.queries)
        windows = [allowed[start : start + blocks.queries, start : start + blocks.window] for start in starts]
        # (c, q, w), added to the scores of windows.
        self._bias = torch.zeros(len(windows), *windows[0].shape).masked_fill_(~torch.stack(windows), -math.inf)
        self._bias = self._bias.to(device)

    def __call__(self, qkv: Float[Tensor, "b s 3 h e"]) -> Float[Tensor, "b s h e"]:
        """Weighted values of each state; scores are in fp32 or better."""
        bias = self._bias.double() if qkv.dtype == torch.float64 else self._bias
        values: Tensor = _local_attention(qkv, bias, self._order, self._text)[0]
        return values


@dataclass
class _Heads:
    """One group of heads as views: of `tokens` or of their gradients, (3, g, pad + p + n, e)."""

    tokens: Tensor
    pad: int  # rows of zeros before the text, so that the first block's window has something to point at
    text: int
    blocks: tuple[int, int, int]  # count, queries, window

    def of_text(self, i: int) -> Tensor:
        """(g, p, e); i is 0 for queries, 1 for keys, 2 for values."""
        return self.tokens[i, :, self.pad : self.pad + self.text]

    def of_image(self, i: int) -> Tensor:
        """(g, n, e)."""
        return self.tokens[i, :, self.pad + self.text :]

    def in_blocks(self, i: int) -> Tensor:
        """(g * c, q, e)."""
        _, queries, _ = self.blocks
        return self.of_image(i).reshape(-1, queries, self.tokens.shape[-1])

    def windows(self, i: int) -> Tensor:
        """A copy, (g * c, w, e)."""
        _, queries, window = self.blocks
        first = self.pad + self.text - (window - queries)
        views = self.tokens[i, :, first:].unfold(1, window, queries)  # (g, c, e, w)
        return views.transpose(2, 3).reshape(-1, window, views.shape[2])

    def add_windows(self, i: int, values: Tensor) -> None:
        """Add (g * c, w, e) to where `windows` reads from."""
        count, queries, window = self.blocks
        first = self.pad + self.text - (window - queries)
        target = torch.unflatten(self.tokens[i, :, first:], 1, (-1, queries))
        values = torch.unflatten(values, 0, (-1, count))  # (g, c, w, e)
        for part in range(window // queries):
            target[:, part : part + count] += values[:, :, part * queries : (part + 1) * queries]


def _group_size(device: torch.device, heads: int, bytes_per_head: int) -> int:
    budget = _GROUP_BYTES.get(device.type, _GROUP_BYTES_ELSEWHERE)
    return max(1, min(heads, budget // bytes_per_head))


def _blocked(image: Tensor, bias: Tensor) -> Tensor:
    """(g, n, ...) as (g, c, q, ...)."""
    return torch.unflatten(image, 1, bias.shape[:2])


def _of_heads(blocks: Tensor, bias: Tensor) -> Tensor:
    """(g * c, ...) as (g, c, ...)."""
    return torch.unflatten(blocks, 0, (-1, len(bias)))


def _exact_bmm(a: Tensor, b: Tensor) -> Tensor:
    """The products a @ b, not rounded to 16 bits if those are the types of the factors."""
    if a.dtype.itemsize > 2:
        return torch.bmm(a, b)
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _bmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write the products a @ b into `out`, in its precision."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(_exact_bmm(a, b) if out.dtype.itemsize > 2 else torch.bmm(a, b))


def _text_probs(heads: _Heads, scores: Tensor) -> Tensor:
    """Probabilities (g, p, p) of the text's queries, in `scores`."""
    _bmm_into(scores, heads.of_text(0), heads.of_text(1).transpose(1, 2))
    later = torch.ones(heads.text, heads.text, dtype=torch.bool, device=scores.device).triu(1)
    scores.masked_fill_(later, -math.inf)
    return torch.softmax(scores, -1, out=scores)


def _image_probs(heads: _Heads, bias: Tensor, key_windows: Tensor, scores: Tensor) -> Tensor:
    """Probabilities (g, n, p + w) of the image's queries, text first, in `scores`."""
    _bmm_into(scores[..., : heads.text], heads.of_image(0), heads.of_text(1).transpose(1, 2))
    near = _exact_bmm(heads.in_blocks(0), key_windows.transpose(1, 2))
    torch.add(_of_heads(near, bias), bias, out=_blocked(scores, bias)[..., heads.text :])
    return torch.softmax(scores, -1, out=scores)


def _split(image: Tensor, text: int, like: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """The parts of (g, n, p + w) over the text, (g, n, p), and over windows, (g * c, q, w), in the type of `like`."""
    near = image[..., text:].reshape(-1, queries, image.shape[-1] - text)
    return image[..., :text].to(like.dtype), near.to(like.dtype)


def _arrange(x: Tensor, order: Tensor | None, bias: Tensor, text: int) -> tuple[Tensor, int]:
    """(b, s, k, h, e) as (k, b * h, pad + p + n, e) in `order`, filled up with zeros, and `pad`."""
    b, s, k, h, e = x.shape
    count, queries, window = bias.shape
    pad = max(0, window - queries - text)
    tokens = x.new_empty(k, b * h, pad + text + count * queries, e)
    tokens[:, :, :pad] = 0
    tokens[:, :, pad + s :] = 0
    source = x if order is None else x.index_select(1, order)
    torch.unflatten(tokens, 1, (b, h))[:, :, :, pad : pad + s] = source.permute(2, 0, 3, 1, 4)
    return tokens, pad


def _restore(tokens: Tensor, order: Tensor | None, pad: int, batch: int, states: int) -> Tensor:
    """The inverse of `_arrange`."""
    x = torch.unflatten(tokens, 1, (batch, -1))[:, :, :, pad : pad + states].permute(1, 3, 0, 2, 4)
    if order is None:
        return x.contiguous()
    return torch.empty_like(x, memory_format=torch.contiguous_format).index_copy_(1, order, x)


@torch.library.custom_op("dalle1::local_attention", mutates_args=())
def _local_attention(qkv: Tensor, bias: Tensor, order: Tensor | None, text: int) -> tuple[Tensor, Tensor]:
    """Values (b, s, h, e), and the arranged queries (scaled), keys and values that the backward pass needs."""
    count, queries, window = bias.shape
    with torch.autocast(qkv.device.type, enabled=False):
        tokens, pad = _arrange(qkv, order, bias, text)
        tokens[0] *= qkv.shape[-1] ** -0.5
        values = torch.empty_like(tokens[:1])
        n_heads, padded = tokens.shape[1], count * queries
        size = _group_size(qkv.device, n_heads, padded * (text + window) * bias.element_size())
        image_scores = bias.new_empty(size, padded, text + window)
        text_scores = bias.new_empty(size, text, text)
        for first in range(0, n_heads, size):
            group = slice(first, first + size)
            heads = _Heads(tokens[:, group], pad, text, (count, queries, window))
            out = _Heads(values[:, group], pad, text, (count, queries, window))
            g = heads.tokens.shape[1]
            v = heads.of_text(2)
            _bmm_into(out.of_text(0), _text_probs(heads, text_scores[:g]).to(v.dtype), v)
            probs = _image_probs(heads, bias, heads.windows(1), image_scores[:g])
            far, near = _split(probs, text, v, queries)
            torch.bmm(far, v, out=out.of_image(0))
            _blocked(out.of_image(0), bias).add_(_of_heads(torch.bmm(near, heads.windows(2)), bias))
        return _restore(values, order, pad, len(qkv), qkv.shape[1])[:, :, 0], tokens


@_local_attention.register_fake
def _(qkv: Tensor, bias: Tensor, order: Tensor | None, text: int) -> tuple[Tensor, Tensor]:
    b, s, _, h, e = qkv.shape
    count, queries, window = bias.shape
    pad = max(0, window - queries - text)
    return qkv.new_empty(b, s, h, e), qkv.new_empty(3, b * h, pad + text + count * queries, e)


@torch.library.custom_op("dalle1::local_attention_backward", mutates_args=())
def _local_attention_backward(grad: Tensor, tokens: Tensor, bias: Tensor, order: Tensor | None, text: int) -> Tensor:
    """Gradient (b, s, 3, h, e) of the loss by `qkv` from that by the values, (b, s, h, e)."""
    count, queries, window = bias.shape
    with torch.autocast(grad.device.type, enabled=False):
        grad_values, pad = _arrange(grad[:, :, None].to(tokens.dtype), order, bias, text)
        grad_tokens = torch.zeros_like(tokens)
        n_heads, padded = tokens.shape[1], count * queries
        size = _group_size(grad.device, n_heads, padded * (text + window) * bias.element_size())
        scratch = bias.new_empty(2, size, padded, text + window)
        text_scratch = bias.new_empty(2, size, text, text)
        for first in range(0, n_heads, size):
            group = slice(first, first + size)
            blocks = (count, queries, window)
            heads = _Heads(tokens[:, group], pad, text, blocks)
            upstream = _Heads(grad_values[:, group], pad, text, blocks)
            result = _Heads(grad_tokens[:, group], pad, text, blocks)
            g = heads.tokens.shape[1]
            _text_backward(heads, upstream, result, text_scratch[:, :g])
            _image_backward(heads, upstream, result, bias, scratch[:, :g])
        grad_tokens[0] *= tokens.shape[-1] ** -0.5
        return _restore(grad_tokens, order, pad, len(grad), grad.shape[1])


@_local_attention_backward.register_fake
def _(grad: Tensor, tokens: Tensor, bias: Tensor, order: Tensor | None, text: int) -> Tensor:
    b, s, h, e = grad.shape
    return tokens.new_empty(b, s, 3, h, e)


def _scores_gradient(probs: Tensor, grad_probs: Tensor) -> Tensor:
    """Gradient by the scores of a softmax, in `grad_probs`: probs * (grad_probs - sum(probs * grad_probs))."""
    grad_probs.mul_(probs)
    return grad_probs.addcmul_(probs, grad_probs.sum(-1, keepdim=True), value=-1)


def _text_backward(heads: _Heads, upstream: _Heads, result: _Heads, scratch: Tensor) -> None:
    """Set the gradients of the text's queries, keys and values as far as the text's own values give them."""
    q, k, v, grad = heads.of_text(0), heads.of_text(1), heads.of_text(2), upstream.of_text(0)
    probs = _text_probs(heads, scratch[0])
    _bmm_into(result.of_text(2), probs.to(v.dtype).transpose(1, 2), grad)
    _bmm_into(scratch[1], grad, v.transpose(1, 2))
    grad_scores = _scores_gradient(probs, scratch[1]).to(q.dtype)
    torch.bmm(grad_scores, k, out=result.of_text(0))
    torch.bmm(grad_scores.transpose(1, 2), q, out=result.of_text(1))


def _image_backward(heads: _Heads, upstream: _Heads, result: _Heads, bias: Tensor, scratch: Tensor) -> None:
    """Add what the image's values give; set the gradients of the image's queries."""
    text, queries = heads.text, bias.shape[1]
    q, k, v, grad = heads.of_image(0), heads.of_text(1), heads.of_text(2), upstream.of_image(0)
    key_windows, blocked_grad = heads.windows(1), upstream.in_blocks(0)
    probs = _image_probs(heads, bias, key_windows, scratch[0])
    far, near = _split(probs, text, v, queries)
    result.of_text(2).baddbmm_(far.transpose(1, 2), grad)
    result.add_windows(2, torch.bmm(near.transpose(1, 2), blocked_grad))
    _bmm_into(scratch[1][..., :text], grad, v.transpose(1, 2))
    near_grad = _exact_bmm(blocked_grad, heads.windows(2).transpose(1, 2))
    _blocked(scratch[1], bias)[..., text:] = _of_heads(near_grad, bias)
    far, near = _split(_scores_gradient(probs, scratch[1]), text, q, queries)
    torch.bmm(far, k, out=result.of_image(0))
    _blocked(result.of_image(0), bias).add_(_of_heads(torch.bmm(near, key_windows), bias))
    result.of_text(1).baddbmm_(far.transpose(1, 2), q)
    result.add_windows(1, torch.bmm(near.transpose(1, 2), heads.in_blocks(0)))


def _save(ctx: Any, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the arranged tokens are an output too, but nothing comes back for them
    _, bias, ctx.order, ctx.text = inputs
    ctx.save_for_backward(output[1], bias)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    tokens, bias = ctx.saved_tensors
    return _local_attention_backward(grad, tokens, bias, ctx.order, ctx.text), None, None, None


_local_attention.register_autograd(_backward, setup_context=_save)
