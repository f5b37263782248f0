"""The autoregressive transformer over one stream of text tokens, then image tokens (Ramesh et al. 2021, sec. 2.2).

Every state predicts the token after it: the first text_seq_len states predict text over the text vocabulary, the
others image tokens over the image vocabulary. No head sees the other's classes: one head over both vocabularies with
the impossible classes masked, as in other implementations, is the same softmax.

Two streams of the same length are possible (the paper's figure is read both ways), see `TransformerConfig.start`:

    one:  start, t0, ..., t255 | z0, ..., z1022             t255 predicts z0
    two:  start, t0, ..., t254 | image start, z0, ..., z1022

Shapes: b batch, t text_seq_len, n image_seq_len, s = t + n states, d d_model.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle1.models.activations import QuickGELU
from dalle1.models.attention import Attend, build_attention, resolve_backend
from dalle1.models.attention_masks import StreamLayout, layer_patterns
from dalle1.models.compilation import prepare_compiler
from dalle1.models.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from dalle1.models.options import (
    Activation,
    AttentionBackend,
    AttentionPattern,
    ConvOffsets,
    LayerPatterns,
    Padding,
    StreamStart,
    check_field_types,
)
from dalle1.models.resblock_scaling import ResblockScale, residual


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Architecture of the transformer. Defaults are the paper's 12-billion-parameter model (app. B.1).

    Where the paper is silent or can be read in two ways, the comment says what the choice is."""

    text_vocab_size: int = 16384  # BPE entries; padding is counted on top
    image_vocab_size: int = 8192  # codes of the dVAE
    text_seq_len: int = 256  # text tokens per sample, padding included
    grid_height: int = 32  # rows of image tokens
    grid_width: int = 32  # image tokens in a row
    n_layers: int = 64  # of attention and MLP
    n_heads: int = 62  # of attention; they share d_model
    d_model: int = 3968  # width of the states, a multiple of n_heads
    mlp_ratio: int = 4  # hidden width of the MLPs in units of d_model (paper, table 2)
    # `paper`: row and column layers in the paper's order, the last one convolutional; `full`: all causal; or the
    # pattern of each layer, first to last.
    attention: LayerPatterns | tuple[AttentionPattern, ...] = "paper"
    conv_kernel_size: int = 11  # columns of the convolutional pattern, odd; it has (size + 1) / 2 rows
    conv_offsets: ConvOffsets = "wrapped"  # the two readings of the paper's figure, see `image_offsets`
    # Start states, see the module's docstring. `one` is how those who saw the paper's figure 10 built it; its text
    # mentions a start-of-image token, which only `two` has.
    start: StreamStart = "one"
    # What stands after a caption: a learned vector for each text position (paper, sec. 2.2), or one for all.
    padding: Padding = "per_position"
    padding_has_position: bool = True  # padding gets the text position's embedding too; the paper does not say
    activation: Activation = "quick_gelu"  # x * sigmoid(1.702 x), the Sparse Transformer's; or the exact GELU
    dropout: float = 0.0  # on what each branch adds (Sparse Transformer, sec. 5.3); the paper mentions none
    norm_eps: float = 1e-5  # of layer norms; the paper does not say, this is PyTorch's
    # Standard deviation of a weight times sqrt(fan in) at the start. 0.125 is the Sparse Transformer's (sec. 6);
    # small models on little data learn faster from larger weights.
    init_scale: float = 0.125

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in (
            "text_vocab_size",
            "text_seq_len",
            "grid_height",
            "grid_width",
            "n_layers",
            "n_heads",
            "mlp_ratio",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"TransformerConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.image_vocab_size < 2:
            raise ValueError(f"TransformerConfig.image_vocab_size must be >= 2, got {self.image_vocab_size}")
        if self.d_model < 1 or self.d_model % self.n_heads:
            raise ValueError(
                f"TransformerConfig.d_model must be a multiple of n_heads ({self.n_heads}), got {self.d_model}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"TransformerConfig.dropout must be in [0, 1), got {self.dropout}")
        for name in ("init_scale", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"TransformerConfig.{name} must be a finite number > 0, got {getattr(self, name)}")
        if isinstance(self.attention, list):  # out of YAML and JSON
            object.__setattr__(self, "attention", tuple(self.attention))
        for pattern in (*self.layer_patterns, "conv"):
            self.layout.offsets(pattern)  # raises for an unknown pattern or a bad kernel size

    @property
    def image_seq_len(self) -> int:
        """Image tokens per picture."""
        return self.grid_height * self.grid_width

    @property
    def text_classes(self) -> int:
        """Classes of a text token: BPE entries, then one padding class per text position, or one."""
        return self.text_vocab_size + (self.text_seq_len if self.padding == "per_position" else 1)

    @property
    def layer_patterns(self) -> tuple[AttentionPattern, ...]:
        """Attention pattern of each layer, first to last."""
        return layer_patterns(self.attention, self.n_layers)

    @property
    def layout(self) -> StreamLayout:
        """Where in the stream is what."""
        extra = 1 if self.start == "one" else 0
        return StreamLayout(
            text_states=self.text_seq_len + extra,
            image_states=self.image_seq_len - extra,
            grid_height=self.grid_height,
            grid_width=self.grid_width,
            conv_kernel_size=self.conv_kernel_size,
            conv_offsets=self.conv_offsets,
        )


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """What training needs of one batch."""

    loss: Tensor  # sum of the weighted nats; the rest has no gradient
    text_nats: Tensor  # (b, t)
    image_nats: Tensor  # (b, n)
    text_correct: Tensor  # bool: the token is the likeliest
    image_correct: Tensor


# Standard deviation of the image head's weights when it starts from the dVAE's codes: first logits of about 1.
_CODE_HEAD_STD = 0.1


class Norm(nn.LayerNorm):
    """A layer norm whose gains may come in fewer bits than its input, as those of sharded blocks do."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Same shape and type."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Float[Tensor, "b s d"], attend: Attend) -> Float[Tensor, "b s d"]:
        """Attend from each state as `attend` does."""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (b, s, 3, n_heads, head_dim)
        return self.out(attend(qkv).flatten(2))


class Block(nn.Module):
    """Pre-norm residual block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.attention_norm = Norm(d, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = Norm(d, eps=config.norm_eps)
        hidden = config.mlp_ratio * d
        activation = QuickGELU() if config.activation == "quick_gelu" else nn.GELU()
        self.mlp = nn.Sequential(nn.Linear(d, hidden), activation, nn.Linear(hidden, d))
        self.dropout = nn.Dropout(config.dropout)
        self.recompute = False  # keep only the input for the backward pass
        self.attention_scale: ResblockScale | None = None  # for training in fp16
        self.mlp_scale: ResblockScale | None = None

    def forward(self, x: Float[Tensor, "b s d"], attend: Attend) -> Float[Tensor, "b s d"]:
        """Same shape."""
        if self.recompute and self.training:
            # Inside of what is compiled: a compiler then sees the recomputation too.
            y: Tensor = checkpoint(self._forward, x, attend, use_reentrant=False)
            return y
        return self._forward(x, attend)

    def _forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = residual(x, lambda x: self.dropout(self.attention(self.attention_norm(x), attend)), self.attention_scale)
        return residual(x, lambda x: self.dropout(self.mlp(self.mlp_norm(x))), self.mlp_scale)


class DalleTransformer(nn.Module):
    """Text and image tokens to the logits of each. Token ids are not offset at this boundary.

    Text ids are in [0, text_vocab_size) or, for padding at text position p, text_vocab_size + p.

    Attributes:
        attention_backend: How `forward` and `losses` attend; may be changed at any time.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.start = nn.Parameter(torch.empty(d))
        if config.start == "two":
            self.image_start = nn.Parameter(torch.empty(d))
        self.text_embedding = nn.Embedding(config.text_classes, d)
        self.text_position_embedding = nn.Embedding(config.text_seq_len, d)
        self.image_embedding = nn.Embedding(config.image_vocab_size, d)
        self.row_embedding = nn.Embedding(config.grid_height, d)
        self.column_embedding = nn.Embedding(config.grid_width, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.text_head = nn.Linear(d, config.text_classes)
        self.image_head = nn.Linear(d, config.image_vocab_size)
        self.attention_backend: AttentionBackend = "auto"
        self._attends: dict[tuple[AttentionPattern, AttentionBackend, torch.device], Attend] = {}
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Initial weights of the Sparse Transformer (sec. 6), which the paper names as its model."""
        d, depth, scale = self.config.d_model, 2 * self.config.n_layers, self.config.init_scale
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if name.endswith("bias") or "head" in name:
                parameter.zero_()
            elif "row_" in name or "column_" in name:
                parameter.normal_(std=scale / math.sqrt(2 * d))
            elif "embedding" in name or name in ("start", "image_start"):
                parameter.normal_(std=scale / math.sqrt(d))
            else:
                shrink = math.sqrt(depth) if name.endswith(("out.weight", "mlp.2.weight")) else 1.0
                parameter.normal_(std=scale / math.sqrt(parameter.shape[1]) / shrink)

    @torch.no_grad()
    def start_image_codes(self, codebook: Float[Tensor, "v c"]) -> None:
        """Start the image embedding and the image head from the dVAE's code vectors instead of at random.

        Codes that decode to similar pixels then begin with similar embeddings and similar logits, so that what
        is learned of one code helps its neighbours. Each gets its own random rotation into d_model."""
        centered = codebook.float() - codebook.float().mean(0)
        directions, strengths, _ = torch.linalg.svd(centered, full_matrices=False)
        # Half-whitened: otherwise the few strongest directions, the colours, would be all there is.
        points = directions * strengths.sqrt()
        d = self.config.d_model
        for weight, std in (
            (self.image_embedding.weight, self.config.init_scale / math.sqrt(d)),
            (self.image_head.weight, _CODE_HEAD_STD),
        ):
            basis = nn.init.orthogonal_(torch.empty(points.shape[1], d))
            placed = points @ basis
            weight.copy_(placed * (std / placed.std()))

    def execute_blocks(self, *, recompute: bool = False, compiled: bool = False) -> None:
        """Choose how blocks are executed; what they compute stays the same, but for the random masks of a dropout.

        Args:
            recompute: Keep only each block's input for the backward pass and compute the rest again there
                ("activation checkpointing", paper, app. E): a third more work, a fraction of the memory.
            compiled: Compile each block with `torch.compile`. Every block is one graph.
        """
        if compiled:
            prepare_compiler()
        for block, _ in self._layers():
            block.recompute = recompute
            block._compiled_call_impl = None  # as torch.nn.Module.compile leaves it
            if compiled:
                block.compile(fullgraph=True, dynamic=False)

    def _layers(self) -> Iterator[tuple[Block, AttentionPattern]]:
        """Blocks and their patterns, first to last."""
        return zip(cast("Iterable[Block]", self.blocks), self.config.layer_patterns, strict=True)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made again when it is needed, and cannot all be pickled."""
        return self.__dict__ | {"_attends": {}}

    def _attend(self, pattern: AttentionPattern, device: torch.device) -> Attend:
        config = self.config
        backend = resolve_backend(
            self.attention_backend, device, head_dim=config.d_model // config.n_heads, n_states=config.layout.n_states
        )
        key = (pattern, backend, device)
        if key not in self._attends:
            # Their tensors must serve training too, also if the first call was only to look.
            with torch.inference_mode(False):
                self._attends[key] = build_attention(self.config.layout, pattern, backend, device)
        return self._attends[key]

    def empty_text(self) -> Int[Tensor, "1 t"]:
        """The tokens of no caption: padding at every position."""
        first, count = self.config.text_vocab_size, self.config.text_seq_len
        return torch.arange(first, first + count, device=self.start.device)[None]

    def embed_text(self, text_tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b p d"]:
        """The start state, then those of the text tokens, all but the last one if the image has its own start."""
        config = self.config
        text = self.text_embedding(self._text_classes(text_tokens))
        positions = self.text_position_embedding.weight
        if config.padding_has_position:
            text = text + positions
        else:
            text = text + positions * (text_tokens < config.text_vocab_size)[..., None]
        states = torch.cat([self.start.expand(len(text), 1, -1), text], dim=1)
        return states[:, : config.layout.text_states]

    def embed_image(self, image_tokens: Int[Tensor, "b m"], first: int = 0) -> Float[Tensor, "b m d"]:
        """States of image tokens first .. first + m - 1, which stand one position later if the image has a start."""
        first += 1 if self.config.start == "two" else 0
        return self.image_embedding(image_tokens) + self.image_positions(first, image_tokens.shape[1])

    def embed_stream(self, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b m"]) -> Float[Tensor, "b r d"]:
        """All states up to that of the last given image token."""
        parts = [self.embed_text(text_tokens)]
        if self.config.start == "two":
            parts.append((self.image_start + self.image_positions(0, 1)).expand(len(text_tokens), -1, -1))
        return torch.cat([*parts, self.embed_image(image_tokens)], dim=1)

    def image_positions(self, first: int, count: int) -> Float[Tensor, "m d"]:
        """What stands for the positions first .. first + count - 1 of the grid."""
        positions = torch.arange(first, first + count, device=self.start.device)
        row, column = positions // self.config.grid_width, positions % self.config.grid_width
        return self.row_embedding(row) + self.column_embedding(column)

    def _text_classes(self, text_tokens: Tensor) -> Tensor:
        """Text ids as classes: they differ only where all padding is one."""
        return text_tokens.clamp(max=self.config.text_classes - 1)

    def hidden_states(
        self, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b s d"]:
        """What the heads read: t states that predict text, n states that predict image tokens.

        Raises: ValueError if either has another length than the config's, or for a backend that cannot run here.
        """
        self._check_lengths(text_tokens, image_tokens)
        # The last image token predicts nothing, so it is never an input.
        x = self.embed_stream(text_tokens, image_tokens[:, :-1])
        for block, pattern in self._layers():
            x = block(x, self._attend(pattern, x.device))
        return self.norm(x)

    def forward(
        self, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b n v"]]:
        """Logits of every text token and of every image token, each given all tokens before it.

        Raises: as `hidden_states`.
        """
        x, t = self.hidden_states(text_tokens, image_tokens), self.config.text_seq_len
        return self.text_head(x[:, :t]), self.image_head(x[:, t:])

    def losses(
        self,
        text_tokens: Int[Tensor, "b t"],
        image_tokens: Int[Tensor, "b n"],
        *,
        text_weights: Float[Tensor, "b t"],
        image_weights: Float[Tensor, "b n"],
    ) -> TokenLosses:
        """Nats of every token, and their sum under the given weights, which can be differentiated.

        The logits of all tokens never exist at the same time.

        Raises: as `hidden_states`.
        """
        x, t = self.hidden_states(text_tokens, image_tokens), self.config.text_seq_len
        text = self._losses(x[:, :t], self.text_head, self._text_classes(text_tokens), text_weights)
        image = self._losses(x[:, t:], self.image_head, image_tokens, image_weights)
        return TokenLosses(
            loss=text.loss + image.loss,
            text_nats=text.nats.view_as(text_tokens),
            image_nats=image.nats.view_as(image_tokens),
            text_correct=text.correct.view_as(text_tokens),
            image_correct=image.correct.view_as(image_tokens),
        )

    @staticmethod
    def _losses(states: Tensor, head: nn.Linear, targets: Tensor, weights: Tensor) -> LinearCrossEntropy:
        states = states.flatten(0, 1)
        return linear_cross_entropy(states, head.weight, head.bias, targets.flatten(), weights.flatten())

    def _check_lengths(self, text_tokens: Tensor, image_tokens: Tensor) -> None:
        config = self.config
        if text_tokens.shape[1] != config.text_seq_len:
            raise ValueError(f"text must have {config.text_seq_len} tokens (text_seq_len), got {text_tokens.shape[1]}")
        if image_tokens.shape[1] != config.image_seq_len:
            raise ValueError(
                f"image must have {config.grid_height} x {config.grid_width} = {config.image_seq_len} tokens, "
                f"got {image_tokens.shape[1]}"
            )
