"""The discrete VAE: pictures to a grid of categorical codes and back (Ramesh et al. 2021, sec. 2.1, app. A).

The defaults of `DVAEConfig` are the paper's architecture. What is unusual about it: no normalisation, residual
branches scaled by 1 / n_layers^2, max-pooling at the end of a group, and no explicit codebook: the decoder's
first 1x1 convolution plays that role.

Shapes: b batch, h w pixels, gh gw token grid (h / downsampling, w / downsampling), v vocab_size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle1.models.options import check_field_types
from dalle1.models.pixels import map_pixels, unmap_pixels
from dalle1.models.relaxation import most_likely_codes, relaxed_codes


@dataclass(frozen=True, kw_only=True, slots=True)
class DVAEConfig:
    """Architecture of the discrete VAE. Defaults are the paper's (app. A.1 and the released code)."""

    vocab_size: int = 8192  # codes
    n_hid: int = 256  # channels of the first encoder group; each later group has twice as many
    n_init: int = 128  # width of the codebook, the decoder's first layer
    n_groups: int = 4  # resolutions; between two groups the sides halve
    n_blocks_per_group: int = 2  # residual blocks, each of four convolutions
    # Side of the square of pixels that enters as one position (space to depth). 1 is the paper; 8 with one
    # group does all work on the token grid, which is what makes small models fast on a CPU.
    patch_size: int = 1
    # Factor on every residual branch; 0 stands for the paper's 1 / (groups * blocks)^2.
    post_gain: float = 0.0

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("n_hid", "n_init", "n_groups", "n_blocks_per_group", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"DVAEConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.vocab_size < 2:
            raise ValueError(f"DVAEConfig.vocab_size must be >= 2, got {self.vocab_size}")
        if self.n_hid % 4:
            raise ValueError(
                f"DVAEConfig.n_hid must be divisible by 4 (blocks are a quarter as wide inside), got {self.n_hid}"
            )
        if self.post_gain < 0:
            raise ValueError(f"DVAEConfig.post_gain must be >= 0 (0 means the paper's), got {self.post_gain}")

    @property
    def downsampling(self) -> int:
        """Pixels per token along each side."""
        return self.patch_size * 2 ** (self.n_groups - 1)

    @property
    def feature_width(self) -> int:
        """Channels of the features that the encoder's head reads."""
        return self.n_hid * 2 ** (self.n_groups - 1)

    @property
    def residual_gain(self) -> float:
        """Factor on every residual branch."""
        return self.post_gain or 1 / (self.n_groups * self.n_blocks_per_group) ** 2


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A same-size convolution with the paper's init: weight N(0, 1 / fan_in), bias 0."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2)
    nn.init.normal_(conv.weight, std=1 / math.sqrt(in_channels * kernel_size**2))
    assert conv.bias is not None, "nn.Conv2d has one by default"
    nn.init.zeros_(conv.bias)
    return conv


@torch.no_grad()
def _center_inputs(conv: nn.Conv2d) -> None:
    """Let a 1x1 convolution over patches start on pixels of mean 0 and about unit variance.

    Mapped pixels lie in [0.1, 0.9]: all 3 * patch^2 inputs share a large mean, and the differences that matter
    are small. Starting on 4 * (x - 0.5) instead gave 87% instead of 78% of recognisable scenes after the same
    90 seconds of training on the generated scenes."""
    conv.weight.mul_(4)
    assert conv.bias is not None, "all convolutions here have a bias"
    conv.bias.copy_(-0.5 * conv.weight.sum(dim=(1, 2, 3)))


class ResidualBlock(nn.Module):
    """Pre-activation bottleneck block: shortcut + gain * branch, the branch a quarter as wide inside."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_sizes: tuple[int, ...], gain: float) -> None:
        super().__init__()
        hidden = out_channels // 4
        self.gain = gain
        self.shortcut = nn.Identity() if in_channels == out_channels else _conv(in_channels, out_channels, 1)
        widths = (in_channels, hidden, hidden, hidden, out_channels)
        self.convs = nn.ModuleList(
            _conv(widths[i], widths[i + 1], kernel_size) for i, kernel_size in enumerate(kernel_sizes)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Same sides, `out_channels` channels."""
        branch = x
        for conv in self.convs:
            branch = conv(F.relu(branch))
        return torch.add(self.shortcut(x), branch, alpha=self.gain)


def _groups(
    config: DVAEConfig, widths: list[int], *, kernel_sizes: tuple[int, ...], resample: type[nn.Module]
) -> Iterator[nn.Module]:
    """Groups of residual blocks with a change of resolution between two groups; widths[0] is the input's."""
    for group in range(config.n_groups):
        for block in range(config.n_blocks_per_group):
            in_channels = widths[group] if block == 0 else widths[group + 1]
            yield ResidualBlock(in_channels, widths[group + 1], kernel_sizes=kernel_sizes, gain=config.residual_gain)
        if group < config.n_groups - 1:
            yield resample()


class Downsample(nn.Module):
    """2x2 max-pooling: the paper found it better than averaging."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Half the sides."""
        return F.max_pool2d(x, 2)


class Upsample(nn.Module):
    """Nearest-neighbour doubling."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Twice the sides."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Encoder(nn.Module):
    """Mapped pixels (b, 3, h, w) to logits over the codes (b, v, gh, gw)."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        patch = config.patch_size
        widths = [config.n_hid] + [config.n_hid * 2**group for group in range(config.n_groups)]
        # The paper's first kernel is 7x7 on pixels; patches have their neighbours' pixels inside already.
        self.stem = _conv(3 * patch**2, config.n_hid, 7 if patch == 1 else 1)
        if patch > 1:
            _center_inputs(self.stem)
        self.patch_size = patch
        self.groups = nn.Sequential(*_groups(config, widths, kernel_sizes=(3, 3, 3, 1), resample=Downsample))
        self.head = _conv(widths[-1], config.vocab_size, 1)

    def features(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c gh gw"]:
        """What the head reads: features >= 0 on the token grid."""
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)
        return F.relu(self.groups(self.stem(x)))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b v gh gw"]:
        """Logits on the token grid."""
        return self.head(self.features(x))


class Decoder(nn.Module):
    """Code vectors (b, n_init, gh, gw) to likelihood parameters (b, 6, h, w): location and log scale per colour."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        patch = config.patch_size
        widths = [config.n_init] + [config.n_hid * 2**group for group in reversed(range(config.n_groups))]
        self.patch_size = patch
        self.groups = nn.Sequential(*_groups(config, widths, kernel_sizes=(1, 3, 3, 3), resample=Upsample))
        self.head = _conv(widths[-1], 6 * patch**2, 1)

    def forward(self, x: Float[Tensor, "b c gh gw"]) -> Float[Tensor, "b 6 h w"]:
        """Channels 0-2: location mu in logit space; 3-5: raw ln b."""
        out = self.head(F.relu(self.groups(x)))
        return F.pixel_shuffle(out, self.patch_size) if self.patch_size > 1 else out


class DVAE(nn.Module):
    """Encoder, codebook and decoder. Pictures are in [0, 1]; tokens are int64 in [0, vocab_size)."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        # The decoder's first 1x1 convolution on one-hot codes: a table of code vectors and a bias.
        self.codebook = nn.Parameter(torch.randn(config.vocab_size, config.n_init) / math.sqrt(config.vocab_size))
        self.codebook_bias = nn.Parameter(torch.zeros(config.n_init))
        self.decoder = Decoder(config)

    def features(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw c"]:
        """What the encoder's head reads, channels last.

        Raises: ValueError if a side is not a multiple of `config.downsampling`."""
        factor = self.config.downsampling
        if image.shape[-2] % factor or image.shape[-1] % factor:
            raise ValueError(
                f"picture sides must be multiples of {factor} (the dVAE's downsampling), got "
                f"{image.shape[-2]}x{image.shape[-1]}; resize or crop first"
            )
        # All maps are then channels last, so that moving the channels to the end and back copies nothing.
        mapped = map_pixels(image).contiguous(memory_format=torch.channels_last)
        return self.encoder.features(mapped).permute(0, 2, 3, 1)

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw v"]:
        """Logits over the codes of each grid position, always fp32 (the relaxation is sensitive to rounding)."""
        features = self.features(image)
        with torch.autocast(image.device.type, enabled=False):
            return F.linear(features.float(), self._head_weight.float(), self.encoder.head.bias)

    def encode(self, image: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b gh gw"]:
        """Tokens: the most likely code of each position, without noise (paper, sec. 2.2)."""
        return most_likely_codes(self.features(image), self._head_weight, self._head_bias)

    def relaxed(
        self,
        image: Float[Tensor, "b 3 h w"],
        *,
        temperature: float,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> tuple[Float[Tensor, "b 6 h w"], Float[Tensor, "b gh gw"]]:
        """Likelihood parameters from relaxed codes, and the KL divergence of each position's logits to uniform.

        The relaxation and the two 1x1 convolutions around it are in fp32 whatever the precision (paper, app. A.2).
        There may be one generator for each picture. Raises: as `relaxed_codes` and `features`."""
        vectors, kl = relaxed_codes(
            self.features(image),
            self._head_weight,
            self._head_bias,
            self.codebook,
            temperature=temperature,
            generator=generator,
        )
        return self.decode_vectors(vectors), kl

    @property
    def _head_weight(self) -> Float[Tensor, "v c"]:
        return self.encoder.head.weight[:, :, 0, 0]

    @property
    def _head_bias(self) -> Float[Tensor, " v"]:
        assert self.encoder.head.bias is not None, "all convolutions here have a bias"
        return self.encoder.head.bias

    def decode_vectors(self, vectors: Float[Tensor, "b gh gw c"]) -> Float[Tensor, "b 6 h w"]:
        """Likelihood parameters from (mixtures of) code vectors."""
        return self.decoder((vectors + self.codebook_bias).permute(0, 3, 1, 2))

    def decode(self, image_tokens: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Picture in [0, 1] from tokens: the centre of each pixel's distribution; its scale is ignored."""
        return reconstruction(self.decode_vectors(F.embedding(image_tokens, self.codebook)))


def reconstruction(parameters: Float[Tensor, "b 6 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The picture in [0, 1] at the centre of a decoder's distributions (paper, app. A.3)."""
    return unmap_pixels(torch.sigmoid(parameters[:, :3].float()))
