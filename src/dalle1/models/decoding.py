"""Image tokens one position after the other: what a transformer computes when only the newest state is new.

A text is computed once. All candidates of a prompt attend to the same copy of its keys and values; each has its own of
the image states that its layers can still reach (`kv_cache`).

What a row comes to does not depend, bit for bit, on the rows beside it: see `_PACKED_ROWS`.

A step comes in two forms of the same computation. On a CPU it reads slices that grow with the position. On CUDA it is
static: the same operations on the same memory at every position, masked, so that they are recorded once as a CUDA graph
(`cuda_graph`) and launched together.

Shapes: t text states, r rows (sequences), g texts with n candidates each, h heads, e head_dim, d d_model, v image
vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.models.attention import CausalAttention
from dalle1.models.cached_attention import LayerStates, Texts
from dalle1.models.compilation import prepare_compiler
from dalle1.models.cuda_graph import CudaGraph, try_to_record
from dalle1.models.kv_cache import Place, Places
from dalle1.models.packed_linear import can_pack, in_type, pack, with_children
from dalle1.models.transformer import Block, DalleTransformer

# Matrix libraries sum in another order for few rows. Measured in fp32 on an x86 CPU (torch 2.13, MKL, oneDNN, one and
# two threads), a row's bits are the same for any number of rows from: packed layers 2, `F.linear` 16, and batched
# products as `cached_attention` says. What is short of that is filled up. On a GPU kernels may change beyond 16 rows;
# there only the same number of rows is sure to agree.
_PACKED_ROWS = 2  # at least
_ROW_MULTIPLE = 16  # of linear layers that are not packed


@dataclass(frozen=True, kw_only=True, eq=False)
class TextStates:
    """What candidates need of a text."""

    keys: list[Float[Tensor, "h t e"]]  # of each layer
    values: list[Float[Tensor, "h t e"]]
    start: list[Float[Tensor, "2 h e"]]  # key and value of the image's own start state, where it has one, of each layer
    logits: Float[Tensor, " v"]  # of the first image token


class Decoder:
    """A transformer for decoding."""

    def __init__(
        self,
        transformer: DalleTransformer,
        *,
        dtype: torch.dtype | None = None,
        static: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """Decode with the weights that `transformer` has now.

        Args:
            transformer: In evaluation mode.
            dtype: Of the states and of a copy of the blocks' weights and embeddings; their own without a copy if not
                given. The head stays as it is, and logits have 32 bits at least. 16 bits are for GPUs: on an x86 CPU
                bf16 was measured to take 2.1 times as long as fp32 for one candidate and 1.1 times for 32.
            static: Whether steps are static, see above; if not given, on CUDA. On a CPU it takes twice as long.
            compiled: Compile static layers with `torch.compile`, once for each pattern and number of rows: half as many
                kernels.

        Raises: ValueError if the transformer is in training mode, `dtype` is none of floating-point numbers, or what is
            to be compiled is not static.
        """
        if transformer.training:
            raise ValueError("a transformer must be in evaluation mode to decode, it is in training; call eval() first")
        own = transformer.start.dtype
        dtype = own if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a type of floating-point numbers, got {dtype}")
        self.device, self.layout = transformer.start.device, transformer.config.layout
        self.static = self.device.type == "cuda" if static is None else static
        if compiled and not self.static:
            raise ValueError("compiled steps must be static: others have other shapes at every position; set static")
        self.packed = dtype == own and not self.static and can_pack(transformer)
        self.model = transformer
        if self.packed:
            parts = {name: pack(getattr(transformer, name)) for name in ("blocks", "image_head")}
            self.model = cast("DalleTransformer", with_children(transformer, parts))
        elif self.static or dtype != own:
            # Also of the same type: a graph must hold on to the memory of the weights.
            kept = ("norm", "image_head", "text_head")
            self.model = cast("DalleTransformer", in_type(transformer, dtype, but=kept))
        if self.model is not transformer:
            for block in cast("Iterable[Block]", self.model.blocks):
                block.attention_scale = block.mlp_scale = None  # they are for training in fp16
        self._layer: Callable[..., Tensor] = _layer
        if compiled:
            prepare_compiler()
            self._layer = torch.compile(_layer, fullgraph=True, dynamic=False)
        if self.static:
            config = transformer.config
            self._places = {each: Places(self.layout, each, self.device) for each in set(config.layer_patterns)}
            with torch.no_grad():
                self._positions = self.model.image_positions(0, config.image_seq_len)
        self._kept: _StaticStep | None = None

    @torch.no_grad()
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

        with self.in_own_type():
            # The image's start attends to the whole text and itself under any pattern.
            x = model.embed_stream(text_tokens, text_tokens[:, :0])
            for block in model.blocks:
                x = block.forward(x, attend_and_keep)  # not what `compile` made of it
            return TextStates(keys=keys, values=values, start=start, logits=self._head(x[:, -1:])[0])

    def in_own_type(self) -> torch.autocast:
        """Always in the type of the weights: a run in mixed precision draws pictures too."""
        return torch.autocast(self.device.type, enabled=False)

    def step(
        self, layers: Sequence[LayerStates], image_tokens: Int[Tensor, " r"], token: int, state: int
    ) -> Float[Tensor, "r v"]:
        """Logits after one more token of each row, the token's number and its state's given."""
        x = self.model.embed_image(image_tokens[:, None], token)
        return self._advance(x, layers, [state] * len(layers))

    def static_step(
        self, layers: Sequence[LayerStates], image_tokens: Int[Tensor, " r"], state: Int[Tensor, " 1"]
    ) -> Float[Tensor, "r v"]:
        """The same by the same operations for every state."""
        x = self.model.image_embedding(image_tokens[:, None]) + self._positions.index_select(0, state)
        places = {pattern: of_pattern.at(state) for pattern, of_pattern in self._places.items()}
        return self._advance(x, layers, [places[pattern] for pattern in self.model.config.layer_patterns])

    def _advance(
        self, x: Float[Tensor, "r 1 d"], layers: Sequence[LayerStates], states: Sequence[int | Place]
    ) -> Float[Tensor, "r v"]:
        rows = len(x)
        x = self._fill(x)
        for block, layer, state in zip(cast("Iterable[Block]", self.model.blocks), layers, states, strict=True):
            x = self._layer(block, x, layer, state)
        return self._head(x)[:rows]

    def _head(self, x: Float[Tensor, "r s d"]) -> Float[Tensor, "r v"]:
        """Image logits of the last state."""
        model, last = self.model, self._fill(x[:, -1])
        logits: Tensor = model.image_head(model.norm(last.to(model.norm.weight.dtype)))
        return logits[: len(x)].to(torch.promote_types(logits.dtype, torch.float32))

    def _fill(self, x: Tensor) -> Tensor:
        """Rows of zeros at the end, as many as products of linear layers need."""
        if self.static:
            return x
        rows = max(len(x), _PACKED_ROWS) if self.packed else -(-len(x) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        return x if rows == len(x) else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])

    def keep(self, step: _StaticStep) -> None:
        """Keep what a finished picture leaves, for the next one."""
        self._kept = step

    def take(self, texts: Sequence[Texts]) -> _StaticStep | None:
        """What was kept, if it is for texts and candidates as many as these; otherwise it is dropped."""
        kept, self._kept = self._kept, None
        return kept if kept is not None and kept.shape == _shape(texts) else None


def _layer(block: Block, x: Float[Tensor, "f 1 d"], states: LayerStates, state: int | Place) -> Float[Tensor, "f 1 d"]:
    return block.forward(x, lambda qkv: states.attend(qkv, state))  # not what `compile` made of it


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
        config = decoder.model.config
        self._decoder = decoder
        self._tokens = 0  # decoded so far
        self._first_state = 1 if config.start == "two" else 0  # that of the first token
        self._make_room(
            [
                [
                    Texts(
                        keys=_stack([text.keys[layer] for text in texts]),
                        values=_stack([text.values[layer] for text in texts]),
                        candidates=candidates,
                        fill=not decoder.static,
                    )
                    for texts, candidates in groups
                ]
                for layer in range(config.n_layers)
            ]
        )
        if config.start == "two":
            for layer, states in enumerate(self._layers):
                of_groups = [_spread([text.start[layer] for text in texts], each) for texts, each in groups]
                states.image.append(0, *torch.cat(of_groups).unbind(1))
        # Of the next token.
        self.logits: Float[Tensor, "r v"] = torch.cat(
            [_spread([text.logits for text in texts], each) for texts, each in groups]
        )

    def _make_room(self, texts: Sequence[Sequence[Texts]]) -> None:
        """Layers that keep nothing of an image yet, for these texts of each of them."""
        decoder = self._decoder
        self._static = decoder.take(texts[0]) if decoder.static else None
        if self._static is not None:
            self._static.start_anew(texts)
            self._layers = self._static.layers
            return
        # Tensors made under `inference_mode` could not be written to without it.
        with torch.inference_mode(torch.is_inference_mode_enabled() and not decoder.static), torch.no_grad():
            if decoder.static:
                texts = [[each.copy() for each in of_layer] for of_layer in texts]
            patterns = decoder.model.config.layer_patterns
            self._layers = [
                LayerStates(decoder.layout, pattern, of_layer)
                for pattern, of_layer in zip(patterns, texts, strict=True)
            ]
            self._static = _StaticStep(self._layers) if decoder.static else None

    @torch.no_grad()
    def step(self, image_tokens: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Append a token to every sequence; logits of the one after it.

        Raises: ValueError if all tokens of the picture but the last are there: none follows that.
        """
        self._check_unfinished()
        decoder, token, state = self._decoder, self._tokens, self._first_state + self._tokens
        with decoder.in_own_type():
            if self._static is None:
                self.logits = decoder.step(self._layers, image_tokens, token, state)
            else:
                self.logits = self._static.step(decoder, image_tokens, state)
        self._tokens += 1
        if self._finished:
            # What is next may need the memory, before this object is gone, or the graph.
            if self._static is not None:
                decoder.keep(self._static)
            self._layers, self._static = [], None
        return self.logits

    @torch.no_grad()
    def spread(self, candidates: int) -> Decoding:
        """A decoding that goes on from here with `candidates` copies of every row, one after the other.

        So what candidates have in common is decoded once. This one stays as it is, and texts are shared as before.

        Raises: ValueError if `candidates` is below 1, or all tokens but the last are there.
        """
        if candidates < 1:
            raise ValueError(f"candidates must be >= 1, got {candidates}")
        self._check_unfinished()
        other = copy.copy(self)
        other._make_room([[each.spread(candidates) for each in layer.texts] for layer in self._layers])
        for new, layer in zip(other._layers, self._layers, strict=True):
            new.image.load(layer.image, candidates)
        other.logits = self.logits.repeat_interleave(candidates, 0)
        return other

    @property
    def _finished(self) -> bool:
        return self._tokens >= self._decoder.model.config.image_seq_len - 1

    def _check_unfinished(self) -> None:
        if self._finished:
            raise ValueError(f"a picture must not have more than {self._tokens} steps: its last token needs none")


class _StaticStep:
    """Memory of a step at any position, and its CUDA graph."""

    def __init__(self, layers: list[LayerStates]) -> None:
        self.layers, self.shape = layers, _shape(layers[0].texts)
        keys = layers[0].texts[0].keys
        self._device = keys.device
        self._tokens = torch.zeros(layers[0].rows, dtype=torch.int64, device=keys.device)
        self._state = torch.zeros(1, dtype=torch.int64, device=keys.device)
        self._graph: CudaGraph | None = None
        self._tried = False

    def start_anew(self, texts: Sequence[Sequence[Texts]]) -> None:
        """Forget the image, and take other texts."""
        for layer, of_layer in zip(self.layers, texts, strict=True):
            layer.image.clear()
            for mine, new in zip(layer.texts, of_layer, strict=True):
                mine.keys.copy_(new.keys)
                mine.values.copy_(new.values)

    def step(self, decoder: Decoder, image_tokens: Int[Tensor, " r"], state: int) -> Float[Tensor, "r v"]:
        """Logits after one more token of each row."""
        self._tokens.copy_(image_tokens)
        self._state.fill_(state)

        def step() -> Tensor:  # may be called again: it writes the same to the same place
            return decoder.static_step(self.layers, self._tokens, self._state)

        if not self._tried:
            self._graph, self._tried = try_to_record(step, self._device), True
        return step() if self._graph is None else self._graph.replay().clone()


def _shape(texts: Sequence[Texts]) -> tuple[tuple[int, int], ...]:
    """Texts and candidates of each group."""
    return tuple((len(each.keys), each.candidates) for each in texts)


def _stack(of_texts: Sequence[Float[Tensor, "h t e"]]) -> Float[Tensor, "g h t e"]:
    """One text is not copied."""
    return of_texts[0][None] if len(of_texts) == 1 else torch.stack(list(of_texts))


def _spread(of_texts: Sequence[Tensor], candidates: int) -> Tensor:
    """One row for each candidate of each text."""
    return torch.stack(list(of_texts)).repeat_interleave(candidates, 0)
