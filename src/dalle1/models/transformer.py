"""The autoregressive transformer over one stream of text tokens, then image tokens (Ramesh et al. 2021, sec. 2.2).

Stream: one start state, text_seq_len text tokens (padding has a learned vector per position), then the image
tokens in raster order. State s predicts the token after it: states 0 .. text_seq_len - 1 predict text over the
text vocabulary, the later ones predict image tokens over the image vocabulary; no head sees the other's classes.

Shapes: b batch, t text_seq_len, n image_seq_len, s states = 1 + t + n, d d_model.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle1.models.attention_masks import image_mask, image_offsets, paper_layer_patterns, stream_mask
from dalle1.models.kv_cache import KVCache
from dalle1.models.options import AttentionPattern, ConvOffsets, LayerPatterns, check_field_types


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Architecture of the transformer. Defaults are the paper's 12-billion-parameter model (app. B.1)."""

    text_vocab_size: int = 16384  # BPE entries; padding is counted on top, one class per text position
    image_vocab_size: int = 8192  # codes of the dVAE
    text_seq_len: int = 256
    grid_height: int = 32  # rows of image tokens
    grid_width: int = 32
    n_layers: int = 64
    n_heads: int = 62
    d_model: int = 3968
    # `paper`: row and column layers in the paper's order, the last one convolutional; `full`: all causal.
    attention: LayerPatterns = "paper"
    conv_kernel_size: int = 11
    conv_offsets: ConvOffsets = "wrapped"  # the two readings of the paper's figure, see `image_offsets`
    # Standard deviation of a weight times sqrt(fan in) at the start. 0.125 is the Sparse Transformer's (sec. 6);
    # small models on little data learn faster from larger weights.
    init_scale: float = 0.125

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("text_vocab_size", "text_seq_len", "grid_height", "grid_width", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"TransformerConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.image_vocab_size < 2:
            raise ValueError(f"TransformerConfig.image_vocab_size must be >= 2, got {self.image_vocab_size}")
        if self.d_model < 1 or self.d_model % self.n_heads:
            raise ValueError(
                f"TransformerConfig.d_model must be a multiple of n_heads ({self.n_heads}), got {self.d_model}"
            )
        if self.init_scale <= 0:
            raise ValueError(f"TransformerConfig.init_scale must be > 0, got {self.init_scale}")
        image_offsets(  # raises for a bad kernel size
            "conv", 1, 1, conv_kernel_size=self.conv_kernel_size, conv_offsets=self.conv_offsets
        )

    @property
    def image_seq_len(self) -> int:
        """Image tokens per picture."""
        return self.grid_height * self.grid_width

    @property
    def text_classes(self) -> int:
        """Classes of a text token: BPE entries, then one padding class per text position."""
        return self.text_vocab_size + self.text_seq_len

    @property
    def layer_patterns(self) -> tuple[AttentionPattern, ...]:
        """Attention pattern of each layer, first to last."""
        if self.attention == "paper":
            return paper_layer_patterns(self.n_layers)
        full: AttentionPattern = "full"
        return (full,) * self.n_layers


# Standard deviation of the image head's weights when it starts from the dVAE's codes: first logits of about 1.
_CODE_HEAD_STD = 0.1


class SparseTransformerGELU(nn.Module):
    """x * sigmoid(1.702 x), the Sparse Transformer's approximation of GELU."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Elementwise."""
        return F.silu(1.702 * x) / 1.702  # the same as x * sigmoid(1.702 x), in fewer passes over memory


class Attention(nn.Module):
    """Multi-head self-attention under a fixed mask, over a whole stream or over one new state with a cache."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, x: Float[Tensor, "b s d"], mask: Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b s d"]:
        """Attend from `s` states to themselves, or, with a cache, to all states stored so far and themselves."""
        q, k, v = rearrange(self.qkv(x), "b s (qkv heads d) -> qkv b heads s d", qkv=3, heads=self.n_heads)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (b, n_heads, s, head_dim)
        return self.out(rearrange(y, "b heads s d -> b s (heads d)"))


class Block(nn.Module):
    """Pre-norm residual block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.attention_norm = nn.LayerNorm(d)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), SparseTransformerGELU(), nn.Linear(4 * d, d))

    def forward(
        self, x: Float[Tensor, "b s d"], mask: Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b s d"]:
        """Same shape; see `Attention.forward` for the cache."""
        x = x + self.attention(self.attention_norm(x), mask, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class DalleTransformer(nn.Module):
    """Text and image tokens to the logits of each. Token ids are not offset at this boundary.

    Text ids are in [0, text_vocab_size) or, for padding at text position p, text_vocab_size + p.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.start = nn.Parameter(torch.empty(d))
        self.text_embedding = nn.Embedding(config.text_classes, d)
        self.text_position_embedding = nn.Embedding(config.text_seq_len, d)
        self.image_embedding = nn.Embedding(config.image_vocab_size, d)
        self.row_embedding = nn.Embedding(config.grid_height, d)
        self.column_embedding = nn.Embedding(config.grid_width, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(d)
        self.text_head = nn.Linear(d, config.text_classes)
        self.image_head = nn.Linear(d, config.image_vocab_size)
        self._masks: dict[tuple[AttentionPattern, torch.device], Tensor] = {}
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
            elif "embedding" in name or name == "start":
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

    def mask(self, pattern: AttentionPattern, device: torch.device) -> Tensor:
        """Bool (s, s) mask of one pattern over the whole stream; built once per device."""
        if (pattern, device) not in self._masks:
            config = self.config
            offsets = image_offsets(
                pattern,
                config.grid_height,
                config.grid_width,
                conv_kernel_size=config.conv_kernel_size,
                conv_offsets=config.conv_offsets,
            )
            mask = stream_mask(image_mask(offsets, config.image_seq_len), 1 + config.text_seq_len)
            self._masks[pattern, device] = mask.to(device)
        return self._masks[pattern, device]

    def empty_text(self) -> Int[Tensor, "1 t"]:
        """The tokens of no caption: padding at every position."""
        first, count = self.config.text_vocab_size, self.config.text_seq_len
        return torch.arange(first, first + count, device=self.start.device)[None]

    def embed_text(self, text_tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t1 d"]:
        """The start state, then the text states."""
        text = self.text_embedding(text_tokens) + self.text_position_embedding.weight
        return torch.cat([self.start.expand(len(text), 1, -1), text], dim=1)

    def embed_image(self, image_tokens: Int[Tensor, "b m"], first: int = 0) -> Float[Tensor, "b m d"]:
        """Image states of raster positions first .. first + m - 1."""
        positions = torch.arange(first, first + image_tokens.shape[1], device=image_tokens.device)
        row = self.row_embedding(positions // self.config.grid_width)
        column = self.column_embedding(positions % self.config.grid_width)
        return self.image_embedding(image_tokens) + row + column

    def forward(
        self, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b n v"]]:
        """Logits of every text token and of every image token, each given all tokens before it.

        Raises: ValueError if either has another length than the config's.
        """
        self._check_lengths(text_tokens, image_tokens)
        # The last image token predicts nothing, so it is never an input.
        x = torch.cat([self.embed_text(text_tokens), self.embed_image(image_tokens[:, :-1])], dim=1)
        s = x.shape[1]
        for block, pattern in zip(self.blocks, self.config.layer_patterns, strict=True):
            x = block(x, self.mask(pattern, x.device)[:s, :s])
        x = self.norm(x)
        t = self.config.text_seq_len
        return self.text_head(x[:, :t]), self.image_head(x[:, t:])

    def _check_lengths(self, text_tokens: Tensor, image_tokens: Tensor) -> None:
        config = self.config
        if text_tokens.shape[1] != config.text_seq_len:
            raise ValueError(f"text must have {config.text_seq_len} tokens (text_seq_len), got {text_tokens.shape[1]}")
        if image_tokens.shape[1] != config.image_seq_len:
            raise ValueError(
                f"image must have {config.grid_height} x {config.grid_width} = {config.image_seq_len} tokens, "
                f"got {image_tokens.shape[1]}"
            )

    def prefill(self, text_tokens: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b v"], KVCache]:
        """Logits of the first image token, and the cache that `decode` continues from."""
        x = self.embed_text(text_tokens)
        config = self.config
        cache = KVCache.empty(
            n_layers=config.n_layers,
            batch=len(x),
            n_heads=config.n_heads,
            length=config.text_seq_len + config.image_seq_len,
            head_dim=config.d_model // config.n_heads,
            like=x,
        )
        return self._advance(x, cache), cache

    def decode(self, image_tokens: Int[Tensor, " b"], cache: KVCache) -> Float[Tensor, "b v"]:
        """Logits of the next image token after appending `image_tokens`, one per sequence, to the cache."""
        first = cache.length - 1 - self.config.text_seq_len
        return self._advance(self.embed_image(image_tokens[:, None], first), cache)

    def _advance(self, x: Float[Tensor, "b s d"], cache: KVCache) -> Float[Tensor, "b v"]:
        """Run new states through all layers, store them, and return the image logits of the last one."""
        start, stop = cache.length, cache.length + x.shape[1]
        for layer, (block, pattern) in enumerate(zip(self.blocks, self.config.layer_patterns, strict=True)):
            x = block(x, self.mask(pattern, x.device)[start:stop, :stop], cache, layer)
        cache.length = stop
        return self.image_head(self.norm(x[:, -1]))

    def count_parameters(self) -> dict[str, int]:
        """Number of parameters: `body` (the paper's effective count), `embeddings` (in and out), `total`."""
        total = sum(parameter.numel() for parameter in self.parameters())
        body = sum(parameter.numel() for parameter in self.blocks.parameters())
        return {"body": body, "embeddings": total - body, "total": total}
