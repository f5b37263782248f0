"""Stage 2: the transformer learns the joint distribution of captions and image tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dalle1.data.dataset import Batch
from dalle1.evaluation.pictures import to_pictures
from dalle1.losses import masked_mean, token_nats
from dalle1.models.transformer import DalleTransformer
from dalle1.picture_grid import GridBlock, draw_page
from dalle1.sampling.generate import generate
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer
from dalle1.training.optim import OptimConfig
from dalle1.training.stage_module import StageModule


@dataclass(frozen=True, kw_only=True)
class TransformerOptimConfig(OptimConfig):
    """How a transformer is trained."""

    text_weight: float = 1 / 8  # of the text loss; image tokens weigh 1 - text_weight (paper, sec. 2.2)
    # Whether predicting the padding after a caption counts in the text loss; the paper does not say. Nats per
    # text token are always reported over real tokens and the first padding token, which ends the caption.
    pads_in_text_loss: bool = True
    # Share of captions that are left out, in [0, 1): the model then also learns pictures without a caption, which
    # classifier-free guidance needs (Ho and Salimans 2022). 0 is the paper.
    caption_dropout: float = 0.0
    # Start the image embedding and the image head from the dVAE's code vectors, so that codes that look alike
    # begin alike; false is the paper.
    start_from_codebook: bool = False
    # Keep the image tokens of every training picture in memory after its first use, 4 bytes a token.
    cache_image_tokens: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"optim.text_weight must be in [0, 1], got {self.text_weight}")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"optim.caption_dropout must be in [0, 1), got {self.caption_dropout}")


class TransformerModule(StageModule):
    """Trains a `DalleTransformer` on the tokens of a frozen dVAE."""

    model: DalleTransformer
    optim: TransformerOptimConfig

    def __init__(
        self,
        model: DalleTransformer,
        optim: TransformerOptimConfig,
        *,
        seed: int,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
    ) -> None:
        """Train `model` on what the two tokenizers make of captioned pictures.

        Raises: ValueError if the model's vocabularies or caption length are not the tokenizers'.
        """
        super().__init__(
            model,
            optim,
            seed=seed,
            text_tokenizer=text_tokenizer,
            dvae_sha256=image_tokenizer.sha256,
            caption_dropout=optim.caption_dropout,
        )
        for name, mine, theirs in (
            ("text_vocab_size", model.config.text_vocab_size, text_tokenizer.vocab_size),
            ("text_seq_len", model.config.text_seq_len, text_tokenizer.seq_len),
            ("image_vocab_size", model.config.image_vocab_size, image_tokenizer.vocab_size),
        ):
            if mine != theirs:
                raise ValueError(
                    f"the transformer's {name} must be the tokenizer's {theirs}, got {mine}; set model.{name}={theirs}"
                )
        if optim.start_from_codebook:
            model.start_image_codes(image_tokenizer.dvae.codebook.detach())
        self.image_tokenizer = image_tokenizer
        self._tokens_of: dict[int, Tensor] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted nats of one batch."""
        share = self.optim.caption_dropout
        dropped = None
        if share:
            draws = torch.rand(len(batch["index"]), 1, generator=self.step_generator(), device=self.device)
            dropped = draws < share
        return self._step("train", batch, self._cached_tokens(batch), dropped)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the same for the validation set."""
        self._step("val", batch, self._image_tokens(batch["image"]))

    def draw_pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """One sample of each caption, drawn from the same random numbers every time."""
        text_tokens = batch["text_tokens"].to(self.device)
        tokens = generate(self.model, text_tokens, seeds=[[i] for i in range(len(text_tokens))])
        samples = to_pictures(self.image_tokenizer.decode(tokens.flatten(0, 1)))
        block = GridBlock(title="one sample for each caption", pictures=samples, columns=len(samples))
        return {"samples": draw_page([block])}

    def _step(self, split: str, batch: Batch, image_tokens: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Weighted nats; captions that are `dropped`, bool (b, 1), are no input and no target."""
        text_tokens = batch["text_tokens"]
        is_target = torch.ones_like(text_tokens, dtype=torch.bool)
        if dropped is not None:
            text_tokens = torch.where(dropped, self.model.empty_text(), text_tokens)
            is_target &= ~dropped
        text_logits, image_logits = self.model(text_tokens, image_tokens)
        text_nats = token_nats(text_logits, text_tokens)
        image_nats = token_nats(image_logits, image_tokens).mean()
        is_word = text_tokens < self.model.config.text_vocab_size
        # Every real token and the padding token right after the last one, by which the caption ends.
        is_told = torch.cat([torch.ones_like(is_word[:, :1]), is_word[:, :-1]], dim=1)
        caption_nats = masked_mean(text_nats, is_told & is_target)
        text_loss = masked_mean(text_nats, is_target) if self.optim.pads_in_text_loss else caption_nats
        weight = self.optim.text_weight
        loss = weight * text_loss + (1 - weight) * image_nats
        values: dict[str, Tensor | float] = {
            "loss": loss,
            "text_nats_per_token": caption_nats,
            "image_nats_per_token": image_nats,
            "image_accuracy": (image_logits.argmax(-1) == image_tokens).float().mean(),
        }
        self.log_means(split, values, len(text_tokens))
        return loss

    def _image_tokens(self, image: Tensor) -> Tensor:
        tokens = self.image_tokenizer.encode(image).flatten(1)
        # Out of inference mode: autograd must be able to use them.
        return tokens.clone()

    def _cached_tokens(self, batch: Batch) -> Tensor:
        if not self.optim.cache_image_tokens:
            return self._image_tokens(batch["image"])
        wanted = batch["index"].tolist()
        missing = [place for place, index in enumerate(wanted) if index not in self._tokens_of]
        if missing:
            small = self._image_tokens(batch["image"][missing]).to("cpu", torch.int32)
            self._tokens_of.update({wanted[place]: tokens for place, tokens in zip(missing, small, strict=True)})
        return torch.stack([self._tokens_of[index] for index in wanted]).to(self.device, torch.int64)
