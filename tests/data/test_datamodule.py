"""The Lightning data module: configuration, batches, and resuming inside a real Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from dalle1.data.datamodule import DataConfig, PairDataModule
from dalle1.data.dataset import EncodedCaption
from dalle1.data.shapes_shards import ShapesRecipe

WriteShard = Callable[[str, list[tuple[str, bytes]]], str]
Encode = Callable[..., bytes]
MakeSamples = Callable[..., list[tuple[str, bytes]]]


@pytest.fixture
def config(write_shard: WriteShard, make_samples: MakeSamples) -> DataConfig:
    train, val = write_shard("train.tar", make_samples(11)), write_shard("val.tar", make_samples(3, start=20))
    return DataConfig(train=train, val=[val], image_size=4, batch_size=2, num_workers=0)


def encode_length(caption: str, draw: str | None) -> EncodedCaption:
    return EncodedCaption(torch.tensor([len(caption), draw is not None]), is_cut=False)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("image_size", 0, ValueError, "image_size must be >= 1, got 0"),
        ("batch_size", "16", TypeError, "batch_size must be an integer >= 1, got '16' of type str"),
        ("num_workers", 1.5, TypeError, r"num_workers must be an integer >= 0, got 1\.5 of type float"),
        ("seed", True, TypeError, "seed must be an integer >= 0, got True of type bool"),
        ("on_bad_sample", "ignore", ValueError, "on_bad_sample must be 'error' or 'skip', got 'ignore'"),
        ("augmentation", "flip", ValueError, "augmentation must be 'none', 'dvae' or 'transformer', got 'flip'"),
        ("augmentation", None, ValueError, "augmentation must be 'none', 'dvae' or 'transformer', got None"),
        ("small_pictures", "skip", ValueError, "small_pictures must be 'enlarge' or 'refuse', got 'skip'"),
        ("background", "whit", ValueError, "background: a colour must be a name such as 'white', .*got 'whit'"),
        ("cache_images", "yes", TypeError, "cache_images must be true or false, got 'yes'"),
        ("recipe", {"seed": 1}, TypeError, r"recipe must be a ShapesRecipe or null, got \{'seed': 1\}"),
    ],
)
def test_config_refuses_a_wrong_field_by_name(
    config: DataConfig, field: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(config, **{field: value})


def test_loaders_give_batches_of_their_shards(config: DataConfig) -> None:
    data = PairDataModule(config, encode_text=encode_length)
    data.setup("fit")
    train, val = next(iter(data.train_dataloader())), list(data.val_dataloader())
    assert train["image"].shape == (2, 3, 4, 4)
    assert train["text_tokens"].tolist() == [[len(caption), True] for caption in train["caption"]]
    assert val[0]["text_tokens"].tolist() == [[9, False]] * 2, "captions vary in training alone"
    assert [batch["caption"] for batch in val] == [["number 20", "number 21"], ["number 22"]]


def test_loaders_take_rank_and_world_size_from_the_trainer(config: DataConfig) -> None:
    shares = []
    for rank in range(2):
        data = PairDataModule(config)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        assert len(data.train_dataloader()) == 2
        shares.append([batch["index"].tolist() for batch in (*data.train_dataloader(), *data.val_dataloader())])
    assert shares[0][2:] == [[0, 2]]
    assert shares[1][2:] == [[1]]
    train_ids = [i for share in shares for batch in share[:2] for i in batch]
    assert len(set(train_ids)) == 8


def test_train_captions_are_all_captions_in_order(config: DataConfig) -> None:
    assert list(PairDataModule(config).train_captions()) == [f"number {i}" for i in range(11)]


def test_patterns_of_the_training_shards_are_a_list(config: DataConfig) -> None:
    assert replace(config, train="a.tar").train_patterns == ["a.tar"]
    assert replace(config, train=["a.tar", "b-*.tar"]).train_patterns == ["a.tar", "b-*.tar"]
    with pytest.raises(TypeError, match="shards must be a path, a glob or a list of them, got 3"):
        _ = replace(config, train=3).train_patterns  # type: ignore[arg-type]


def test_only_training_pictures_are_augmented(config: DataConfig, write_shard: WriteShard, encode: Encode) -> None:
    noise = torch.randint(0, 256, (9, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shard = write_shard("noise.tar", [("0.png", encode(Image.fromarray(noise.numpy())))])
    config = replace(config, train=shard, val=shard, batch_size=1)

    def images(config: DataConfig) -> tuple[list[Tensor], list[Tensor]]:
        data = PairDataModule(config)
        train, val = data.train_dataloader(), data.val_dataloader()
        return [batch["image"] for _ in range(2) for batch in train], [batch["image"] for batch in (*val, *val)]

    plain, augmented = images(config), images(replace(config, augmentation="dvae"))
    assert all(torch.equal(image, plain[1][0]) for image in (*plain[0], *plain[1], *augmented[1]))
    assert not torch.equal(augmented[0][0], augmented[0][1])
    assert not torch.equal(augmented[0][0], plain[0][0])
    # The seed of the configuration decides.
    again, other = (images(replace(config, augmentation="dvae", seed=seed))[0] for seed in (0, 1))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, augmented[0], strict=True))
    assert not torch.equal(other[0], augmented[0][0])


@pytest.fixture
def damaged(config: DataConfig, write_shard: WriteShard, make_samples: MakeSamples) -> DataConfig:
    """Two bad samples in training, one of them also in validation."""
    shared = write_shard("shared.tar", [("9.png", b"broken"), *make_samples(1)])
    train = write_shard("damaged.tar", [*make_samples(3), ("8.txt", b"no picture")])
    return replace(config, train=[train, shared], val=shared, on_bad_sample="skip")


def test_bad_samples_of_all_splits_are_counted_once(damaged: DataConfig) -> None:
    data = PairDataModule(damaged)
    for _ in range(2):
        list(data.train_dataloader())
        list(data.val_dataloader())
    assert data.count_findings() == {"picture cannot be decoded": 1, "no picture": 1}
    assert data.n_samples_used == 8


def test_bad_captions_are_counted(damaged: DataConfig) -> None:
    data = PairDataModule(replace(damaged, val="not-needed.tar"))
    assert len(list(data.train_captions())) == 5
    assert data.count_findings() == {"no caption": 1}
    assert data.n_samples_used == 6


def test_bad_samples_of_all_devices_are_joined(damaged: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[dict[str, str]] = []

    def gather(results: list[Any], mine: dict[str, str]) -> None:
        parts.append(mine)
        results[:] = parts if len(parts) == 2 else [mine, {}]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for rank in (1, 0):
        data = PairDataModule(replace(damaged, val=damaged.train))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        list(data.val_dataloader())
        counts = data.count_findings()
    assert len(parts[1]) == 1, "the first device met one of the two"
    assert counts == {"picture cannot be decoded": 1, "no picture": 1}


def test_setup_reports_missing_shards_before_training(config: DataConfig) -> None:
    for stage in ("fit", "validate", None):
        with pytest.raises(FileNotFoundError, match=r"no shards match 'missing\.tar'"):
            PairDataModule(replace(config, val="missing.tar")).setup(stage)


def test_recipe_makes_missing_shards(config: DataConfig, tmp_path: Path) -> None:
    directory = str(tmp_path / "shapes")
    recipe = ShapesRecipe(directory=directory, train_samples=2, val_samples=1, test_samples=1, image_size=16)
    data = PairDataModule(
        replace(config, recipe=recipe, train=f"{directory}/train-*.tar", val=f"{directory}/val-*.tar")
    )
    data.prepare_data()
    data.setup()
    assert (len(data.train_index), len(data.val_index)) == (2, 1)


class Recorder(pl.LightningModule):
    """Notes which samples it is given; saves a checkpoint after a given number of batches."""

    def __init__(self, save_at: int, checkpoint: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.images: list[Tensor] = []
        self._save_at = save_at
        self._checkpoint = checkpoint

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        self.seen.append(batch["index"].tolist())
        self.images.append(batch["image"])
        return self.weight.sum()

    def on_train_batch_end(self, *_: object) -> None:
        if len(self.seen) == self._save_at:
            self.trainer.save_checkpoint(self._checkpoint)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        assert batch["image"].shape[1:] == (3, 4, 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(config: DataConfig, module: Recorder, *, ckpt_path: Path | None = None) -> list[list[int]]:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=13,
        max_epochs=-1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=PairDataModule(config), ckpt_path=ckpt_path)
    return module.seen


# In the first epoch of 5 batches, at its end, and in the second.
@pytest.mark.parametrize("save_at", [3, 5, 7])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
# Lightning asks torch for a class that torch is about to rename.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_training_resumes_with_the_next_batch(config: DataConfig, tmp_path: Path, save_at: int) -> None:
    checkpoint = tmp_path / "saved.ckpt"
    whole = fit(config, Recorder(save_at, checkpoint))
    resumed = fit(config, Recorder(-1, checkpoint), ckpt_path=checkpoint)
    assert len(whole) == 13
    assert resumed == whole[save_at:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_resumes_with_the_same_augmented_pictures(
    config: DataConfig, tmp_path: Path, write_shard: WriteShard, encode: Encode, num_workers: int
) -> None:
    noise = torch.randint(0, 256, (11, 9, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [(f"{i}.png", encode(Image.fromarray(picture.numpy()))) for i, picture in enumerate(noise)]
    config = replace(config, train=write_shard("noise.tar", pictures), augmentation="dvae", num_workers=num_workers)
    checkpoint = tmp_path / "saved.ckpt"
    whole, resumed = Recorder(7, checkpoint), Recorder(-1, checkpoint)
    fit(config, whole)
    fit(config, resumed, ckpt_path=checkpoint)
    assert len(resumed.images) == 6
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed.images, whole.images[7:], strict=True))
