"""Pictures to tokens and back, with a frozen dVAE."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.models.dvae import DVAE


class ImageTokenizer:
    """A frozen dVAE as a tokenizer: pictures in [0, 1] to int64 ids in [0, vocab_size), and back."""

    def __init__(self, dvae: DVAE, *, sha256: str) -> None:
        """Freeze `dvae`; `sha256` is the hash of its weights (see `checkpoint.weights_sha256`)."""
        self.dvae = dvae.eval().requires_grad_(False)
        self.sha256 = sha256

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.dvae.config.vocab_size

    def grid_size(self, image_size: int) -> int:
        """Tokens along one side of a picture of `image_size` pixels.

        Raises: ValueError if the side is not a multiple of the downsampling.
        """
        grid, rest = divmod(image_size, self.dvae.config.downsampling)
        if rest or not grid:
            raise ValueError(
                f"image_size must be a multiple of {self.dvae.config.downsampling}, the dVAE's downsampling, "
                f"got {image_size}"
            )
        return grid

    @torch.inference_mode()
    def encode(self, image: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b gh gw"]:
        """Tokens of pictures, on the pictures' device: those of fp32, whatever training computes in.

        So they are the same in training, in `stage=tokens` and in sampling; in 16 bits some would be their neighbours.
        """
        with torch.autocast(image.device.type, enabled=False):
            return self._on(image.device).encode(image.float())

    @torch.inference_mode()
    def decode(self, image_tokens: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures of tokens, on the tokens' device."""
        return self._on(image_tokens.device).decode(image_tokens)

    def _on(self, device: torch.device) -> DVAE:
        # The dVAE is no child of the trained module (it would be saved again in every checkpoint), so nobody
        # else moves it.
        return self.dvae.to(device)
