"""How likely captions and pictures are to a transformer: the nats of every token, and whether it would guess it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle1.data.fields import require_int
from dalle1.models.transformer import DalleTransformer


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenNats:
    """Nats (-ln of the probability) of every token given all before it, float32, and which are likeliest; on the CPU.

    A slice of rows is those of some of the captioned pictures."""

    text: Float[Tensor, "b t"]  # 0 where a token does not count: after the padding token that ends the caption
    image: Float[Tensor, "b gh gw"]
    text_correct: Bool[Tensor, "b t"]  # whether the token is the likeliest of all; false where it does not count
    image_correct: Bool[Tensor, "b gh gw"]

    def __getitem__(self, rows: slice) -> TokenNats:
        return TokenNats(
            text=self.text[rows],
            image=self.image[rows],
            text_correct=self.text_correct[rows],
            image_correct=self.image_correct[rows],
        )


@torch.inference_mode()
def token_nats(
    transformer: DalleTransformer,
    text_tokens: Int[Tensor, "b t"],
    image_tokens: Int[Tensor, "b gh gw"],
    *,
    batch_size: int = 16,
) -> TokenNats:
    """Nats of captioned pictures, computed on the transformer's device and without dropout.

    Args:
        transformer: In either mode; it is left in the one it was in.
        text_tokens: Of the transformer's text tokenizer.
        image_tokens: Of the transformer's dVAE, one picture for each caption.
        batch_size: Pictures computed at once, which bounds the memory.

    Raises: ValueError if tokens have another shape than the transformer's, or for another number of captions than
        pictures; TypeError or ValueError for a bad `batch_size`.
    """
    require_int("batch_size", batch_size, at_least=1)
    config = transformer.config
    if len(text_tokens) != len(image_tokens):
        raise ValueError(f"each picture must have a caption, got {len(text_tokens)} for {len(image_tokens)} pictures")
    # Checked here, because a grid on its side has as many tokens.
    if image_tokens.shape[1:] != (config.grid_height, config.grid_width):
        height, width = image_tokens.shape[1:]
        raise ValueError(f"image must have {config.grid_height} x {config.grid_width} tokens, got {height} x {width}")
    was_training = transformer.training
    transformer.eval()
    try:
        parts = [
            _nats(transformer, text, image.flatten(1), batch_size)
            for text, image in zip(
                torch.split(text_tokens, batch_size), torch.split(image_tokens, batch_size), strict=True
            )
        ]
    finally:
        transformer.train(was_training)
    text_nats, image_nats, text_correct, image_correct = (torch.cat(values) for values in zip(*parts, strict=True))
    is_told = told_tokens(text_tokens.cpu(), config.text_vocab_size)
    return TokenNats(
        text=text_nats * is_told,
        image=image_nats.view(image_tokens.shape),
        text_correct=text_correct & is_told,
        image_correct=image_correct.view(image_tokens.shape),
    )


def told_tokens(text_tokens: Int[Tensor, "b t"], text_vocab_size: int) -> Bool[Tensor, "b t"]:
    """Which text tokens count, as training reports them: the real ones and the padding token right after the last."""
    is_word = text_tokens < text_vocab_size
    return torch.cat([torch.ones_like(is_word[:, :1]), is_word[:, :-1]], dim=1)


def _nats(
    transformer: DalleTransformer, text: Int[Tensor, "b t"], image: Int[Tensor, "b n"], batch_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nats, and whether it is the likeliest, of each text token (b, t) and image token (b, n) of one batch, on the CPU.

    Nats of text, nats of the image, correct text, correct image."""
    device, rows = transformer.start.device, len(text)
    text, image = text.to(device), image.to(device)
    if device.type == "cuda":
        # FlexAttention is compiled for each number of rows.
        text, image = (F.pad(tokens, (0, 0, 0, batch_size - rows)) for tokens in (text, image))
    # Their weighted sum is for training; here it is not used.
    weights = {
        "text_weights": torch.ones(text.shape, device=device),
        "image_weights": torch.ones(image.shape, device=device),
    }
    losses = transformer.losses(text, image, **weights)
    nats = (losses.text_nats[:rows].float().cpu(), losses.image_nats[:rows].float().cpu())
    return *nats, losses.text_correct[:rows].cpu(), losses.image_correct[:rows].cpu()
