"""What a run shows while it trains: a bar over the whole run, pictures at validation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from dalle1.data.preparation import collate
from dalle1.evaluation.pictures import save_picture
from dalle1.picture_grid import GridBlock, draw_page
from dalle1.training.disk_full import going_on_if_disk_is_full
from dalle1.training.logging import log_picture, log_samples
from dalle1.training.sharding import whole_network
from dalle1.training.stage_module import StageModule


class RunProgress(ProgressBar):
    """One bar from the first to the last update: pictures per second, loss, time left.

    Where output is no terminal, a line every half minute."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        """Lightning's way to silence all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar where training starts or resumes."""
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc=type(pl_module).__name__.removesuffix("Module").lower(),
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            disable=not self._enabled,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by the updates made."""
        if self._bar is None:
            return
        self._bar.update(trainer.global_step - self._bar.n)
        rate = self._bar.format_dict["rate"]
        # Reading the loss waits for a GPU: only when the bar is about to be drawn.
        if rate and self._bar.n - self._bar.last_print_n == 0:
            pictures = rate * len(batch["index"]) * trainer.world_size
            loss = trainer.callback_metrics.get("train/loss", torch.nan)
            self._bar.set_postfix_str(f"{pictures:.0f} pictures/s, loss {float(loss):.4f}", refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error gets a line of its own."""
        self.on_train_end(trainer, pl_module)


class ValidationPictures(pl.Callback):
    """After every validation pictures of what the network does with the first validation samples.

    Stands before `EMA` in the list of callbacks: that one takes the averaged weights out again."""

    def __init__(self, directory: str, n_samples: int = 8, prompts: Sequence[str] | None = None) -> None:
        """Write `<name>-step<step>.png` into `directory`, and show it in the loggers that take pictures.

        Args:
            directory: Where the pictures go.
            n_samples: How many of the first validation samples are shown.
            prompts: Of what stage=transformer draws samples, one each; None for these samples' captions.

        Raises: ValueError if there is nothing to draw.
        """
        if n_samples < 1:
            raise ValueError(f"callbacks.pictures.n_samples must be >= 1, got {n_samples}")
        is_list = not isinstance(prompts, str) and prompts and all(isinstance(each, str) for each in prompts)
        if prompts is not None and not is_list:
            raise ValueError(f"callbacks.pictures.prompts must be a list of texts, or null, got {prompts}")
        self.directory = Path(directory)
        self.n_samples = n_samples
        self.prompts = prompts

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse prompts that cannot be drawn, before anything is trained. Raises: ValueError if one cannot."""
        if self.prompts is None:
            return
        assert isinstance(pl_module, StageModule), "every stage of ours is one"
        if pl_module.record["kind"] != "transformer":
            raise ValueError(
                f"callbacks.pictures.prompts are for stage=transformer, got stage={pl_module.record['kind']}"
            )
        _encode(self.prompts, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw with the averaged weights, which are still in place, and what the module has counted."""
        assert isinstance(pl_module, StageModule), "every stage of ours is one"
        with whole_network(pl_module, trainer.is_global_zero):
            if trainer.is_global_zero:
                self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: StageModule) -> None:
        loader = trainer.val_dataloaders
        assert loader is not None, "validation is running, so there is a loader"
        batch = collate(loader.first_samples(self.n_samples))
        if self.prompts is not None:
            batch["caption"], batch["text_tokens"] = list(self.prompts), _encode(self.prompts, pl_module)
        with trainer.precision_plugin.forward_context():  # as in validation
            pictures = pl_module.draw_pictures(batch)
            samples = pl_module.sample_captions(batch)
        # What Lightning logs this validation's numbers under.
        logged_step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if samples:
            captions = batch["caption"]
            title = ", ".join(f"{number}: {caption}" for number, caption in enumerate(captions, start=1))
            pictures["samples"] = draw_page([GridBlock(title=title, pictures=samples, columns=min(len(samples), 8))])
            log_samples(trainer.loggers, "val/prompts", captions, samples, update=trainer.global_step, step=logged_step)
        for name, picture in pictures.items():
            path = self.directory / f"{name}-step{trainer.global_step:07d}.png"
            with going_on_if_disk_is_full(path):
                save_picture(picture, path)
            log_picture(trainer.loggers, f"val/{name}", picture, logged_step)


def _encode(prompts: Sequence[str], pl_module: StageModule) -> Tensor:
    assert pl_module.text_tokenizer is not None, "a transformer has one"
    return pl_module.text_tokenizer.encode(prompts)
