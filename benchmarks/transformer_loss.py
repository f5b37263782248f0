"""Loss over time of our transformer and DALLE-pytorch's, on the tokens of the demo: `make bench-transformer-loss`.

Both see the same captioned pictures as tokens of the demo's dVAE and text tokenizer (`runs/shapes`), have the same
width, depth and heads, and one after the other all cores. Theirs trains for ten minutes with the defaults of its class
and script. Ours is `train.py stage=transformer experiment=shapes optim.lr=2e-3 optim.caption_dropout=0`, for theirs
leaves no captions out either, made to last a third of that. Image tokens are made before, for both; captions are split
and pictures read while ours trains. The clock stands still while either is validated.

What counts is how long ours takes to the image loss that theirs ends with, both on the same validation pictures. Writes
`transformer_loss.json` and a picture of both curves.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dalle1  # noqa: F401 - before torch, so that threads of both sides wait as they do in training

# isort: split
import hydra
import matplotlib.figure
import peer_transformer
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from measure import Rows, configuration, machine, print_tables, write_report
from torch import Tensor
from tqdm import tqdm

from dalle1.atomic_files import atomic
from dalle1.checkpoint import load_image_tokenizer
from dalle1.cli import errors_in_one_line
from dalle1.data.config import DataConfig
from dalle1.data.datamodule import PairDataModule
from dalle1.data.fields import require_int
from dalle1.data.transforms import to_unit_interval
from dalle1.models.options import AttentionPattern
from dalle1.models.transformer import TransformerConfig
from dalle1.tokenizers.caption_encoder import CaptionEncoder
from dalle1.tokenizers.text_file import load_text_tokenizer
from dalle1.training.run import run
from dalle1.training.transformer_module import TransformerModule

PEER_BATCH = 4  # of its script
Tokens = dict[str, Tensor]  # index (n), text (n, text_seq_len), image (n, image_seq_len)
Curve = list[tuple[float, float]]  # seconds of training, nats per image token of validation


class Clock(pl.Callback):
    """Gives our run the tokens of its pictures; logs with each validation how long training took up to it."""

    def __init__(self, tokens: str) -> None:
        """`tokens`: file with what `make_tokens` returns."""
        self._tokens = Path(tokens)
        self._seconds = 0.0
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start."""
        assert isinstance(pl_module, TransformerModule)
        train = torch.load(self._tokens, weights_only=True)["train"]
        pl_module.known_tokens.update(zip(train["index"].tolist(), train["image"].int(), strict=True))
        self._started = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause."""
        self._seconds += time.monotonic() - self._started

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        pl_module.log("val/training_seconds", self._seconds)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on."""
        self._started = time.monotonic()


def our_run(results: Path, run_dir: Path, *, updates: int, seed: int) -> Any:
    """The configuration of our training: the demo's for fewer updates, and every caption is learned, as by theirs."""
    return configuration(
        *("stage=transformer", "experiment=shapes", f"results_dir={results}", f"run_dir={run_dir}"),
        *(f"seed={seed}", f"optim.max_steps={updates}", "optim.lr=2e-3", "optim.caption_dropout=0"),
        *("+callbacks.clock._target_=transformer_loss.Clock", f"+callbacks.clock.tokens={run_dir}-tokens.pt"),
        *(f"trainer.val_check_interval={max(1, updates // 20)}", "~callbacks.pictures"),
    )


def our_curve(run_dir: Path) -> Curve:
    """What the validations of our training found."""
    with next(run_dir.glob("logs/*/metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/training_seconds"]]
    return [(float(row["val/training_seconds"]), float(row["val/image_nats_per_token"])) for row in rows]


@torch.no_grad()
def make_tokens(cfg: Any) -> dict[str, Tokens]:
    """Tokens of the training and validation pictures and captions, in the order of the first epoch."""
    image_tokenizer = load_image_tokenizer(cfg.dvae)
    text_tokenizer = load_text_tokenizer(
        Path(cfg.text_tokenizer), vocab_size=cfg.text_vocab_size, seq_len=cfg.text_seq_len
    )
    data_config = hydra.utils.instantiate(cfg.data, _convert_="all")
    assert isinstance(data_config, DataConfig)
    data = PairDataModule(data_config, CaptionEncoder(text_tokenizer, truncate=cfg.truncate_captions))
    data.prepare_data()
    data.setup("fit")
    tokens = {}
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        parts = []
        for batch in tqdm(loader, desc=f"tokens, {split}", unit="batch", disable=None):
            image = image_tokenizer.encode(to_unit_interval(batch["pixels"])).flatten(1)
            image = image.clone()  # out of inference mode
            parts.append({"index": batch["index"], "text": batch["text_tokens"], "image": image})
        tokens[split] = {name: torch.cat([part[name] for part in parts]) for name in ("index", "text", "image")}
    return tokens


class Peer:
    """DALLE-pytorch's transformer in the sizes of a configuration of ours; takes our tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        """Random weights."""
        self._text_vocab_size = config.text_vocab_size
        full: AttentionPattern = "full"  # its default
        self.model = peer_transformer.build(
            d_model=config.d_model,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            text_vocab_size=config.text_vocab_size + 1,
            text_seq_len=config.text_seq_len,
            image_vocab_size=config.image_vocab_size,
            grid_size=config.grid_height,
            patterns=(full,) * config.n_layers,
        )
        self._trainer = peer_transformer.Trainer(self.model)

    def _text(self, tokens: Tensor) -> Tensor:
        # Its ids begin at 1; 0 is padding, which it gives an id for each position.
        return torch.where(tokens < self._text_vocab_size, tokens + 1, 0)

    def update(self, text: Tensor, image: Tensor) -> float:
        """One update; returns its loss."""
        return self._trainer.update(self._text(text), image)

    @torch.no_grad()
    def image_nats(self, text: Tensor, image: Tensor) -> float:
        """Nats per image token."""
        self.model.eval()
        total = 0.0
        for text_part, image_part in zip(torch.split(text, 50), torch.split(image, 50), strict=True):
            logits = self.model(self._text(text_part), image_part)[:, text.shape[1] :]
            offset = logits.shape[-1] - self.model.num_image_tokens
            nats = F.cross_entropy(logits[..., offset:].transpose(1, 2), image_part, reduction="sum")
            total += float(nats)
        self.model.train()
        return total / image.numel()


def batches(tokens: Tokens, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches for the peer."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens["index"]), generator=generator)
        for rows in torch.split(order[: len(order) // PEER_BATCH * PEER_BATCH], PEER_BATCH):
            yield tokens["text"][rows], tokens["image"][rows]


def train_peer(peer: Peer, tokens: dict[str, Tokens], *, seconds: float, seed: int) -> Curve:
    """Its curve over `seconds` of training."""
    curve: Curve = []
    trained = 0.0
    with tqdm(total=100, desc="DALLE-pytorch", unit="%", disable=None) as bar:
        for text_batch, image_batch in batches(tokens["train"], seed):
            started = time.monotonic()
            peer.update(text_batch, image_batch)
            trained += time.monotonic() - started
            if trained >= seconds * (len(curve) + 1) / 20:
                curve.append((trained, peer.image_nats(tokens["val"]["text"], tokens["val"]["image"])))
                bar.update(int(100 * min(trained / seconds, 1)) - bar.n)
                bar.set_postfix(image=f"{curve[-1][1]:.4f}", refresh=False)
            if trained >= seconds:
                return curve
    raise AssertionError("batches are endless")


def seconds_to_reach(curve: Curve, nats: float) -> float:
    """Seconds of training after which a validation found `nats` or less; infinite if none did."""
    return next((seconds for seconds, value in curve if value <= nats), math.inf)


def save_picture(curves: dict[str, Curve], path: Path) -> None:
    """Loss over minutes of training."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot([seconds / 60 for seconds, _ in curve], [nats for _, nats in curve], marker=".", label=name)
    axes.axhline(curves["DALLE-pytorch"][-1][1], color="0.7", linewidth=1, linestyle="--")
    axes.set(xlabel="minutes of training", ylabel="validation, nats per image token", yscale="log")
    axes.legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/shapes"), help="of the demo (default: runs/shapes)")
    parser.add_argument("--minutes", type=float, default=10, help="of the peer's training (default: 10)")
    parser.add_argument("--updates", type=int, default=3200, help="of our run (default: 3200)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    default = Path("runs/bench/transformer_loss.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    require_int("--updates", options.updates, at_least=200)
    if not 0 < options.minutes < math.inf:
        raise ValueError(f"--minutes must be > 0, got {options.minutes}")
    if options.out.suffix != ".json":
        # Its directory, without the ending, is emptied.
        raise ValueError(f"--out must end with .json, got '{options.out}'")
    run_dir = options.out.with_suffix("")
    cfg = our_run(options.results, run_dir, updates=options.updates, seed=options.seed)
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)
    peer = Peer(hydra.utils.instantiate(cfg.model))  # first of all: is it installed?
    tokens = make_tokens(cfg)
    with atomic(Path(cfg.callbacks.clock.tokens)) as temporary:
        torch.save(tokens, temporary)
    shutil.rmtree(run_dir, ignore_errors=True)  # else an earlier comparison would be continued
    run(cfg)
    curves = {"ours": our_curve(run_dir)}
    curves["DALLE-pytorch"] = train_peer(peer, tokens, seconds=60 * options.minutes, seed=options.seed)
    save_picture(curves, run_dir / "curves.png")
    peer_seconds, peer_nats = curves["DALLE-pytorch"][-1]
    reached = seconds_to_reach(curves["ours"], peer_nats)
    rows: Rows = [
        {"side": side, "seconds": round(seconds, 1), "image_nats_per_token": round(nats, 4)}
        for side, curve in curves.items()
        for seconds, nats in curve
    ]
    share = round(reached / peer_seconds, 3) if math.isfinite(reached) else None
    ratios = {"time_to_its_final_loss": share}
    write_report(options.out, rows, ratios)
    print(machine())
    print_tables(options.out, rows, [ratios])
    print(f"curves:  {run_dir / 'curves.png'}")


if __name__ == "__main__":
    main()
