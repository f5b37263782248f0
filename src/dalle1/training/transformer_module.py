"""Stage 2: the transformer learns the joint distribution of captions and image tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dalle1.data.preparation import Batch
from dalle1.data.transforms import to_unit_interval
from dalle1.evaluation.pictures import to_pictures
from dalle1.losses import masked_mean
from dalle1.models.accounting import count_flops
from dalle1.models.options import AttentionBackend, check_field_types
from dalle1.models.resblock_scaling import ResblockScaling
from dalle1.models.transformer import DalleTransformer
from dalle1.sampling.sampler import Sampler
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer
from dalle1.training.optim import OptimConfig
from dalle1.training.sharding import FullyShardedStrategy
from dalle1.training.stage_module import StageModule, derive_seed


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
    # Probability of leaving out a merge of the text tokenizer, in [0, 1): captions then come in other pieces in every
    # epoch, in training alone (Provilkov et al. 2020). 0.1 is the paper.
    bpe_dropout: float = 0.0
    # Start the image embedding and the image head from the dVAE's code vectors, so that codes that look alike
    # begin alike; false is the paper.
    start_from_codebook: bool = False
    # Keep the image tokens of every training picture in memory after its first use, 4 bytes a token.
    cache_image_tokens: bool = False
    # Compute the layers' residual branches in fp16, each with a gradient scale of its own, as the paper did; see
    # `models.resblock_scaling`. For devices without bf16.
    resblock_gradient_scaling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"optim.text_weight must be in [0, 1], got {self.text_weight}")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"optim.caption_dropout must be in [0, 1), got {self.caption_dropout}")
        if not 0 <= self.bpe_dropout < 1:
            raise ValueError(f"optim.bpe_dropout must be in [0, 1), got {self.bpe_dropout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """How training is computed; what is learned stays the same but for rounding, so a run may go on with others."""

    attention_backend: AttentionBackend = "auto"  # what computes attention, see `models.attention`
    # Keep only each block's input for the backward pass and compute the rest again: less memory, a third more work.
    activation_checkpointing: bool = False
    compile: bool = False  # every block through torch.compile, as one graph each; for GPUs

    def __post_init__(self) -> None:
        check_field_types(self)


DEFAULT_COMPUTE = ComputeConfig()


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
        compute: ComputeConfig = DEFAULT_COMPUTE,
    ) -> None:
        """Train `model` on what the two tokenizers make of captioned pictures.

        Raises: ValueError if the model's vocabularies or caption length are not the tokenizers', or for options that do
            not go together.
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
        if compute.compile and optim.resblock_gradient_scaling:
            raise ValueError(
                "compute.compile must be false with optim.resblock_gradient_scaling=true, got true: every block has "
                "scales of its own, so no two would share a graph"
            )
        if optim.start_from_codebook:
            model.start_image_codes(image_tokenizer.dvae.codebook.detach())
        self.image_tokenizer = image_tokenizer
        model.attention_backend = compute.attention_backend
        model.execute_blocks(recompute=compute.activation_checkpointing, compiled=compute.compile)
        self.flops_per_sample = 3 * count_flops(model.config).total
        self.tokens_per_sample = model.config.layout.n_states
        # Image tokens of training pictures by their index, kept with `optim.cache_image_tokens`.
        self.known_tokens: dict[int, Tensor] = {}
        self.scaling = _scale_resblocks(model) if optim.resblock_gradient_scaling else None

    def configure_model(self) -> None:
        """Shard the network if the strategy says so; called before training and before each validation of its own."""
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            self.trainer.strategy.shard(self.model)

    @property
    def product_dtype(self) -> torch.dtype:
        """The type that most matrix products of training have their factors in."""
        return torch.float16 if self.scaling is not None else super().product_dtype

    def unscale_gradients(self) -> bool:
        """Unscale the gradients of the resblocks; an overflow in one of them costs an update and nothing else."""
        if self.scaling is None:
            return True
        can_be_made = self.scaling.unscale()
        self.log("train/resblock_scale_min", self.scaling.scales.min())
        self.log("train/resblock_scale_max", self.scaling.scales.max())
        self.log("train/skipped_updates", self.scaling.skipped_updates.float())
        if can_be_made:
            return True
        # A loss that is not finite is no matter of scales: the check of the whole gradient has to see it.
        others = [weight.grad for name, weight in self.model.named_parameters() if not name.startswith("blocks.")]
        return not torch.nn.utils.get_total_norm([each for each in others if each is not None]).isfinite()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted nats of one batch."""
        share = self.optim.caption_dropout
        if self.model.config.dropout:
            # Its masks come from the global generator: from here on a function of the step too, and of the device.
            torch.manual_seed(derive_seed(self.seed, self.global_step, "dropout", self.global_rank, self.part))
        dropped = None
        if share:
            generators = self.sample_generators(len(batch["index"]))
            dropped = torch.stack([torch.rand(1, generator=each, device=self.device) for each in generators]) < share
        return self._step("train", batch, self._train_tokens(batch), dropped)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the same for the validation set."""
        self._step(
            "val", batch, batch["image_tokens"] if "image_tokens" in batch else self._image_tokens(batch["pixels"])
        )

    def sample_captions(self, batch: Batch) -> list[Image.Image]:
        """One sample of each caption, drawn from the same random numbers every time."""
        text_tokens = batch["text_tokens"].to(self.device)
        tokens = Sampler(self.model).sample(text_tokens, seeds=[[i] for i in range(len(text_tokens))])
        return to_pictures(self.image_tokenizer.decode(tokens.flatten(0, 1)))

    def _step(self, split: str, batch: Batch, image_tokens: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Weighted nats; captions that are `dropped`, bool (b, 1), are no input and no target."""
        text_tokens = batch["text_tokens"]
        is_target = torch.ones_like(text_tokens, dtype=torch.bool)
        if dropped is not None:
            text_tokens = torch.where(dropped, self.model.empty_text(), text_tokens)
            is_target &= ~dropped
        is_word = text_tokens < self.model.config.text_vocab_size
        # Every real token and the padding token right after the last one, by which the caption ends.
        is_told = torch.cat([torch.ones_like(is_word[:, :1]), is_word[:, :-1]], dim=1) & is_target
        counts_in_loss = is_target if self.optim.pads_in_text_loss else is_told
        weight = self.optim.text_weight
        losses = self.model.losses(
            text_tokens,
            image_tokens,
            text_weights=weight * counts_in_loss / counts_in_loss.sum().clamp(min=1),
            image_weights=torch.full(image_tokens.shape, (1 - weight) / image_tokens.numel(), device=self.device),
        )
        values: dict[str, Tensor | float] = {
            "loss": losses.loss,
            "text_nats_per_token": masked_mean(losses.text_nats, is_told),
            "text_accuracy": masked_mean(losses.text_correct.float(), is_told),
            "image_nats_per_token": losses.image_nats.mean(),
            "image_accuracy": losses.image_correct.float().mean(),
        }
        n_told = is_told.sum()
        counts = {"text_nats_per_token": n_told, "text_accuracy": n_told}
        self.log_means(split, values, len(text_tokens), counts=counts)
        return losses.loss

    def _image_tokens(self, pixels: Tensor) -> Tensor:
        tokens = self.image_tokenizer.encode(to_unit_interval(pixels)).flatten(1)
        # Out of inference mode: autograd must be able to use them.
        return tokens.clone()

    def _train_tokens(self, batch: Batch) -> Tensor:
        if "image_tokens" in batch:
            return batch["image_tokens"]
        if not self.optim.cache_image_tokens:
            return self._image_tokens(batch["pixels"])
        wanted = batch["index"].tolist()
        missing = [place for place, index in enumerate(wanted) if index not in self.known_tokens]
        if missing:
            small = self._image_tokens(batch["pixels"][missing]).to("cpu", torch.int32)
            self.known_tokens.update({wanted[place]: tokens for place, tokens in zip(missing, small, strict=True)})
        return torch.stack([self.known_tokens[index] for index in wanted]).to(self.device, torch.int64)


def _scale_resblocks(model: DalleTransformer) -> ResblockScaling:
    """Give each residual branch of `model` a gradient scale: those of layer n are resblocks 2n and 2n + 1."""
    weights: list[list[torch.nn.Parameter]] = []
    for block in model.blocks:
        named = dict(block.named_parameters())
        weights.append([weight for name, weight in named.items() if not name.startswith("mlp")])
        weights.append([weight for name, weight in named.items() if name.startswith("mlp")])
    scaling = ResblockScaling(weights)
    for layer, block in enumerate(model.blocks):
        block.attention_scale = scaling.resblock(2 * layer)  # type: ignore[assignment]
        block.mlp_scale = scaling.resblock(2 * layer + 1)  # type: ignore[assignment]
    return scaling
