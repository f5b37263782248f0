"""A contrastive image and text model (Radford et al. 2021), used to rank sampled pictures.

Both towers are pre-norm transformers; a picture's feature is its class state, a caption's the state at its end.
Features are linear projections scaled to unit length.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle1.models.options import check_field_types


@dataclass(frozen=True, kw_only=True, slots=True)
class CLIPConfig:
    """Architecture of both towers. Defaults are CLIP ViT-B/32's, with the transformer's text tokenizer."""

    image_size: int = 224  # pixels; pictures of another size are resized first
    patch_size: int = 32  # pixels
    image_width: int = 768  # of the image tower's states
    image_layers: int = 12  # blocks of attention and MLP
    image_heads: int = 12  # of attention; they share image_width
    text_vocab_size: int = 16384  # BPE entries
    text_seq_len: int = 256  # tokens per caption
    text_width: int = 512  # of the text tower's states
    text_layers: int = 12  # blocks of attention and MLP
    text_heads: int = 8  # of attention; they share text_width
    embed_dim: int = 512  # of the features that are compared
    # Standard deviation of the image positions at the start; CLIP's width^-0.5. A small tower learns where things are
    # much sooner from 0.5, which is about as strong as the patches: places of the generated scenes were at chance
    # before (docs/shapes.md, trials).
    image_position_std: float = 768**-0.5

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.image_position_std <= 0:
            raise ValueError(f"CLIPConfig.image_position_std must be > 0, got {self.image_position_std}")
        for name in self.__slots__:
            if name != "image_position_std" and getattr(self, name) < 1:
                raise ValueError(f"CLIPConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPConfig.image_size must be a multiple of patch_size ({self.patch_size}), got {self.image_size}"
            )
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"CLIPConfig.{tower}_width must be a multiple of {tower}_heads ({heads}), got {width}")


# Bounds of the learned temperature: exp of the first is the start (1 / 0.07), of the second the most (CLIP, sec. 2.5).
INITIAL_LOG_SCALE = math.log(1 / 0.07)
MAX_LOG_SCALE = math.log(100)


class TowerBlock(nn.Module):
    """Pre-norm residual block: attention, then an MLP four times as wide."""

    def __init__(self, width: int, n_heads: int, n_layers: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(wide, nn.GELU(), narrow)
        # CLIP's initial weights: residual branches shrink with depth.
        branch_std = width**-0.5 * (2 * n_layers) ** -0.5
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.out.weight, std=branch_std)
        nn.init.normal_(wide.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(narrow.weight, std=branch_std)
        for layer in (self.qkv, self.out, wide, narrow):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "b s d"], *, causal: bool) -> Float[Tensor, "b s d"]:
        """Same shape."""
        q, k, v = rearrange(
            self.qkv(self.attention_norm(x)), "b s (qkv heads d) -> qkv b heads s d", qkv=3, heads=self.n_heads
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(rearrange(y, "b heads s d -> b s (heads d)"))
        return x + self.mlp(self.mlp_norm(x))


class ImageTower(nn.Module):
    """A vision transformer: pictures in [0, 1] to unnormalised features."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patches = config.image_width, (config.image_size // config.patch_size) ** 2
        self.image_size = config.image_size
        self.patches = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_state = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(patches + 1, width) * config.image_position_std)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            TowerBlock(width, config.image_heads, config.image_layers) for _ in range(config.image_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Feature of each picture; other sizes than the config's are resized (bicubic, as CLIP does)."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)
        # Pixels in [-1, 1]: near zero mean, whatever the data set.
        x = self.patches(2 * image - 1).flatten(2).transpose(1, 2)  # (b, patches, width)
        x = torch.cat([self.class_state.expand(len(x), 1, -1), x], dim=1) + self.positions
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x, causal=False)
        return self.projection(self.norm_out(x[:, 0]))


class TextTower(nn.Module):
    """A causal transformer: text tokens to unnormalised features."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.text_width
        # One state more than tokens: every caption has an end, also one that fills all positions.
        self.vocab_size = config.text_vocab_size
        self.embedding = nn.Embedding(config.text_vocab_size + 1, width)
        self.positions = nn.Parameter(torch.randn(config.text_seq_len + 1, width) * 0.01)
        self.blocks = nn.ModuleList(
            TowerBlock(width, config.text_heads, config.text_layers) for _ in range(config.text_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, text_tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        """Feature of each caption: the state of the end token that follows its last word."""
        end = torch.full_like(text_tokens[:, :1], self.vocab_size)
        # Every padding id becomes the end token; attention is causal, so only the first one matters.
        tokens = torch.cat([text_tokens.clamp(max=self.vocab_size), end], dim=1)
        lengths = (text_tokens < self.vocab_size).sum(dim=1)
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), lengths]
        return self.projection(self.norm_out(x))


class CLIP(nn.Module):
    """Both towers and their learned temperature."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config)
        self.text_tower = TextTower(config)
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """Factor on the cosines, at most 100 (see `limit_scale`)."""
        return self.log_scale.exp()

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Keep the factor at 100 or below; called after an update, because a clamp would stop its gradient."""
        self.log_scale.clamp_(max=MAX_LOG_SCALE)

    def encode_image(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Unit-length features of pictures in [0, 1]."""
        return F.normalize(self.image_tower(image), dim=-1)

    def encode_text(self, text_tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        """Unit-length features of captions.

        Raises: ValueError if captions have another length than the config's.
        """
        if text_tokens.shape[1] != self.text_tower.positions.shape[0] - 1:
            raise ValueError(f"text must have {self.config.text_seq_len} tokens, got {text_tokens.shape[1]}")
        return F.normalize(self.text_tower(text_tokens), dim=-1)
