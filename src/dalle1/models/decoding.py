"""Image tokens one position after the other: what a transformer computes when only the newest state is new.

A text is computed once. All candidates of a prompt attend to the same copy of its keys and values; each has its own of
the image states that its layers can still reach (`kv_cache`).

What a row comes to does not depend, bit for bit, on the rows beside it: see `_PACKED_ROWS`.

Shapes: t text states, r rows (sequences), g texts with n candidates each, h heads, e head_dim, d d_model, v image
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.models.attention import CausalAttention
from dalle1.models.kv_cache import ImageStates
from dalle1.models.packed_linear import can_pack, pack, with_children
from dalle1.models.transformer import Block, DalleTransformer

# Matrix libraries sum in another order for few rows. Measured in fp32 on an x86 CPU (torch 2.13, MKL, oneDNN, one and
# two threads), a row's bits are the same for any number of rows from: packed layers 2, batched products of queries
# with keys and of probabilities with values 4, `F.linear` 16. What is short of that is filled up. The smallest batched
# products have a kernel of their own in PyTorch, below 400 = rows * inner * outer size. That held for heads of 8, 16,
# 20, 24, 62, 64, 100 and 128 dimensions, not of 10. On a GPU kernels may change beyond 16 rows; there only the same
# number of rows is sure to agree.
_PACKED_ROWS = 2  # at least
_ROW_MULTIPLE = 16  # of linear layers that are not packed
_MIN_QUERIES = 4
_MIN_PRODUCTS = 400  # of rows, inner and outer size


# On a CPU always in the type of the weights: a run in mixed precision draws pictures too.
_in_own_type = torch.autocast("cpu", enabled=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextStates:
    """What candidates need of a text."""

    keys: list[Float[Tensor, "h t e"]]  # of each layer
    values: list[Float[Tensor, "h t e"]]
    start: list[Float[Tensor, "2 h e"]]  # key and value of the image's own start state, where it has one, of each layer
    logits: Float[Tensor, " v"]  # of the first image token


class Decoder:
    """A transformer for decoding."""

    def __init__(self, transformer: DalleTransformer) -> None:
        """Decode with the weights that `transformer` has now.

        Raises: ValueError if it is not in evaluation mode.
        """
        if transformer.training:
            raise ValueError("a transformer must be in evaluation mode to decode, it is in training; call eval() first")
        self.packed = can_pack(transformer)
        self.model, self.layout = transformer, transformer.config.layout
        if self.packed:
            parts = {name: pack(getattr(transformer, name)) for name in ("blocks", "image_head")}
            self.model = cast("DalleTransformer", with_children(transformer, parts))
            for block in cast("Iterable[Block]", self.model.blocks):
                block.attention_scale = block.mlp_scale = None  # they are for training in fp16

    @torch.no_grad()
    @_in_own_type  # type: ignore[untyped-decorator]
    def prefill(self, text_tokens: Int[Tensor, "1 t"]) -> TextStates:
        """States of one text.

        Raises: ValueError if it is not one, or has not text_seq_len tokens.
        """
        model, attend, text = self.model, CausalAttention(), self.layout.text_states
        if text_tokens.shape != (1, model.config.text_seq_len):
            raise ValueError(
                f"text must have shape (1, text_seq_len) = (1, {model.config.text_seq_len}), got "
                f"{tuple(text_tokens.shape)}"
            )
        keys, values, start = [], [], []

        def attend_and_keep(qkv: Tensor) -> Tensor:
            key, value = qkv[0, :, 1:].permute(1, 2, 0, 3)  # (h, t, e) each, with the image's start
            keys.append(key[:, :text].contiguous())
            values.append(value[:, :text].contiguous())
            if key.shape[1] > text:
                start.append(torch.stack([key[:, text], value[:, text]]))
            return attend(qkv)

        # The image's start attends to the whole text and itself under any pattern.
        x = model.embed_stream(text_tokens, text_tokens[:, :0])
        for block in model.blocks:
            x = block.forward(x, attend_and_keep)  # not what `compile` made of it
        return TextStates(keys=keys, values=values, start=start, logits=self.head(x[:, -1:])[0])

    def head(self, x: Float[Tensor, "r s d"]) -> Float[Tensor, "r v"]:
        """Image logits of the last state."""
        return self.model.image_head(self.model.norm(_fill(x[:, -1], self.packed)))[: len(x)]


class Decoding:
    """Sequences that are decoded together.

    Rows are in the order of `groups`, text by text: its candidates one after the other."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, groups: Sequence[tuple[Sequence[TextStates], int]]) -> None:
        """Sequences after their texts.

        Args:
            decoder: Of the model.
            groups: Texts, and how many candidates each of them has; several such groups follow one another.
        """
        self._decoder = decoder
        self._groups = [_Group(texts, candidates) for texts, candidates in groups]
        ends = list(accumulate((group.rows for group in self._groups), initial=0))
        self._rows_of = [slice(first, last) for first, last in pairwise(ends)]  # each group
        self._rows = ends[-1]
        layout, config = decoder.layout, decoder.model.config
        like = self._groups[0].keys[0]
        shape = (self._rows, config.n_heads, config.d_model // config.n_heads)
        self._image = [ImageStates(layout, pattern, shape, like) for pattern in config.layer_patterns]
        self._tokens = 0  # decoded so far
        self._first_state = 0  # that of the first token
        if config.start == "two":
            for layer, states in enumerate(self._image):
                keys, values = torch.cat([group.start(layer) for group in self._groups]).unbind(1)
                states.append(0, keys, values)
            self._first_state = 1
        # Of the next token.
        self.logits: Float[Tensor, "r v"] = torch.cat([group.logits for group in self._groups])

    @torch.no_grad()
    @_in_own_type  # type: ignore[untyped-decorator]
    def step(self, image_tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Append a token to every sequence; logits of the one after it."""
        model = self._decoder.model
        x = _fill(model.embed_image(image_tokens[:, None], self._tokens), self._decoder.packed)
        for layer, block in enumerate(model.blocks):
            x = block.forward(x, lambda qkv, layer=layer: self._attend(layer, qkv))
        self._tokens += 1
        self.logits = self._decoder.head(x)[: self._rows]
        return self.logits

    def _attend(self, layer: int, qkv: Float[Tensor, "f 1 3 h e"]) -> Float[Tensor, "f 1 h e"]:
        """From the newest state of each row to its text and its image; 0 for rows that only fill up."""
        q, k, v = qkv[: self._rows, 0].unbind(1)  # (r, h, e)
        keys, values, mask = self._image[layer].append(self._first_state + self._tokens, k, v)
        q = q / math.sqrt(q.shape[-1])
        own = q[:, :, None] @ keys.mT  # (r, h, 1, k)
        if mask is not None:
            own = own.masked_fill(~mask, -math.inf)
        parts = list(zip(self._groups, self._rows_of, strict=True))
        told = torch.cat([group.scores(layer, q[rows]) for group, rows in parts])
        probs = torch.cat([told, own[:, :, 0]], dim=-1).softmax(-1)
        of_text, of_image = probs[..., : told.shape[-1]], probs[..., told.shape[-1] :]
        y = torch.cat([group.mix(layer, of_text[rows]) for group, rows in parts])
        y = y + (of_image[:, :, None] @ values)[:, :, 0]
        return F.pad(y, (0, 0, 0, 0, 0, len(qkv) - self._rows))[:, None]


class _Group:
    """g texts with n candidates each, and attention from these to those."""

    def __init__(self, texts: Sequence[TextStates], candidates: int) -> None:
        self._candidates = candidates
        self.rows = len(texts) * candidates
        # Of each layer, (g, h, t, e). One text is not copied.
        self.keys = [_stack(of_layer) for of_layer in zip(*(text.keys for text in texts), strict=True)]
        self._values = [_stack(of_layer) for of_layer in zip(*(text.values for text in texts), strict=True)]
        self._starts = [text.start for text in texts]
        self.logits = self._spread([text.logits for text in texts])

    def start(self, layer: int) -> Float[Tensor, "r 2 h e"]:
        """Key and value of the image's start."""
        return self._spread([of_text[layer] for of_text in self._starts])

    def _spread(self, of_texts: Sequence[Tensor]) -> Tensor:
        """One row for each candidate."""
        return torch.stack(list(of_texts)).repeat_interleave(self._candidates, 0)

    def scores(self, layer: int, q: Float[Tensor, "r h e"]) -> Float[Tensor, "r h t"]:
        """Products of queries with their text's keys."""
        return self._multiply(q, self.keys[layer].mT)

    def mix(self, layer: int, probs: Float[Tensor, "r h t"]) -> Float[Tensor, "r h e"]:
        """Values of their text, weighted."""
        return self._multiply(probs, self._values[layer])

    def _multiply(self, x: Float[Tensor, "r h i"], y: Float[Tensor, "g h i o"]) -> Float[Tensor, "r h o"]:
        x = x.reshape(-1, self._candidates, *x.shape[1:]).transpose(1, 2)  # (g, h, n, i)
        least = max(_MIN_QUERIES, -(-_MIN_PRODUCTS // (y.shape[-2] * y.shape[-1])))
        x = F.pad(x, (0, 0, 0, max(0, least - self._candidates)))
        return (x @ y)[:, :, : self._candidates].transpose(1, 2).flatten(0, 1)


def _stack(of_texts: Sequence[Float[Tensor, "h t e"]]) -> Float[Tensor, "g h t e"]:
    return of_texts[0][None] if len(of_texts) == 1 else torch.stack(list(of_texts))


def _fill(x: Tensor, packed: bool) -> Tensor:
    """Rows of zeros at the end, as many as products of linear layers need."""
    rows = max(len(x), _PACKED_ROWS) if packed else -(-len(x) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return x if rows == len(x) else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
