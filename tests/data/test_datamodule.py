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

from dalle1.data.config import DataConfig
from dalle1.data.datamodule import PairDataModule
from dalle1.data.findings import Findings
from dalle1.data.order import SampleOrder
from dalle1.data.preparation import EncodedCaption
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
        ("backend", "indexes", ValueError, "backend must be 'auto', 'indexed' or 'stream', got 'indexes'"),
        ("caption", "txt", ValueError, "caption: caption must be text, lines or json:FIELD, got 'txt'"),
        ("caption", "json:", ValueError, "caption: caption must name a field after 'json:', got 'json:'"),
        ("shuffle_window", 0, ValueError, "shuffle_window must be >= 1, got 0"),
        ("stream_buffer", 0, ValueError, "stream_buffer must be >= 1, got 0"),
        ("allow_pipe", 1, TypeError, "allow_pipe must be true or false, got 1"),
        ("max_bad_fraction", "0.1", TypeError, r"max_bad_fraction must be a number in \[0, 1\], got '0.1'"),
        ("max_bad_fraction", 1.5, ValueError, r"max_bad_fraction must be in \[0, 1\], got 1.5"),
        ("tokens", 3, TypeError, "tokens must be a directory or null, got 3"),
        ("filters", {}, TypeError, r"filters must be a FilterConfig, got \{\}"),
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
    assert train["pixels"].shape == (2, 3, 4, 4)
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


def test_devices_that_see_other_data_are_refused(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: list[Any] = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)

    def gather(results: list[Any], mine: Any) -> None:
        results[:] = [mine, mine, theirs[0] if theirs else mine]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for backend in ("indexed", "stream"):
        data = PairDataModule(replace(config, backend=backend))  # type: ignore[arg-type]
        theirs.clear()
        data.train_dataloader()
        theirs.append("of other shards")
        with pytest.raises(ValueError, match=r"see the same data, got other shards or samples on device 2 than on"):
            data.train_dataloader()


def test_train_captions_are_all_captions_in_order(config: DataConfig) -> None:
    data = PairDataModule(config)
    captions = data.train_captions()
    assert data.n_samples_used() == 11, "known before they are read, for a bar"
    assert list(captions) == [f"number {i}" for i in range(11)]


def test_names_of_what_is_trained_on_are_without_directories(config: DataConfig) -> None:
    assert replace(config, train="x/a.tar").source_names == [["a.tar", 1.0]]
    mixture: Any = ["x/a.tar", {"path": ["y/b-*.tar", "y/c.tar"], "weight": 2}]
    names = [["a.tar", 1.0], ["b-*.tar", 2.0], ["c.tar", 2.0]]
    assert replace(config, train=mixture).source_names == names


def test_places_must_be_given(config: DataConfig) -> None:
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=rf"data\.{split} must be given, as data\.{split}=\.\.\."):
            PairDataModule(replace(config, **{split: None})).setup("fit")  # type: ignore[arg-type]


def test_validation_has_no_weights(config: DataConfig) -> None:
    val: Any = [{"path": "a.tar", "weight": 2}]
    with pytest.raises(ValueError, match=r"data\.val must have no weights"):
        replace(config, val=val).sources("val")


def test_mixture_repeats_samples_by_their_weight(
    config: DataConfig, write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    small = write_shard("small.tar", make_samples(2, start=50))
    train: Any = [config.train, {"path": small, "weight": 2.5}]
    data = PairDataModule(replace(config, train=train, batch_size=1))
    loader = data.train_dataloader()
    assert len(loader) == 11 + 5
    keys = [batch["key"][0] for batch in loader]
    assert sorted(keys)[:11] == [f"{i:06d}" for i in range(11)]
    assert sorted(keys.count(f"{i:06d}") for i in (50, 51)) == [2, 3]


def test_too_many_bad_samples_stop_the_run(
    config: DataConfig, write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    members = [*make_samples(180), *((f"bad-{i}.png", b"broken") for i in range(20))]
    shard = write_shard("some.tar", members)
    config = replace(config, train=shard, on_bad_sample="skip")
    with pytest.raises(ValueError, match=r"at most 0\.05 of the samples .* got \d+ of \d+ .*: picture cannot be dec"):
        list(PairDataModule(replace(config, max_bad_fraction=0.05)).train_dataloader())
    assert len(list(PairDataModule(replace(config, max_bad_fraction=0.2)).train_dataloader())) == 100


def test_only_training_pictures_are_augmented(config: DataConfig, write_shard: WriteShard, encode: Encode) -> None:
    noise = torch.randint(0, 256, (9, 14, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shard = write_shard("noise.tar", [("0.png", encode(Image.fromarray(noise.numpy())))])
    config = replace(config, train=shard, val=shard, batch_size=1)

    def images(config: DataConfig) -> tuple[list[Tensor], list[Tensor]]:
        data = PairDataModule(config)
        train, val = data.train_dataloader(), data.val_dataloader()
        return [batch["pixels"] for _ in range(2) for batch in train], [batch["pixels"] for batch in (*val, *val)]

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
    return replace(config, train=[train, shared], val=shared, on_bad_sample="skip", max_bad_fraction=1.0)


def test_bad_samples_of_all_splits_are_counted_once(damaged: DataConfig) -> None:
    data = PairDataModule(damaged)
    for _ in range(2):
        list(data.train_dataloader())
        list(data.val_dataloader())
    assert data.count_findings() == {"picture cannot be decoded": 1, "no picture": 1}
    assert data.n_samples_used() == 8


def test_bad_captions_are_counted(damaged: DataConfig) -> None:
    data = PairDataModule(replace(damaged, val="not-needed.tar"))
    assert len(list(data.train_captions())) == 5
    assert data.count_findings() == {"no caption": 1}
    assert data.n_samples_used() == 6


def test_bad_samples_of_all_devices_are_joined(damaged: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[list[Findings]] = []

    def gather(results: list[Any], mine: list[Findings]) -> None:
        parts.append(mine)
        results[:] = parts if len(parts) == 2 else [mine, []]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for rank in (1, 0):
        data = PairDataModule(replace(damaged, val=damaged.train))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        list(data.val_dataloader())
        counts = data.count_findings()
    assert [len(part.named) for part in parts[0]] == [1], "the second device met one of the two"
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
    assert (len(data.index("train")), len(data.index("val"))) == (2, 1)


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
        self.images.append(batch["pixels"])
        return self.weight.sum()

    def on_train_batch_end(self, *_: object) -> None:
        if len(self.seen) == self._save_at:
            self.trainer.save_checkpoint(self._checkpoint)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        assert batch["pixels"].shape[1:] == (3, 4, 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    config: DataConfig, module: Recorder, *, ckpt_path: Path | None = None, accumulate: int = 1, max_steps: int = 13
) -> list[list[int]]:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
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


@pytest.mark.parametrize("save_at", [2, 5, 8])
@pytest.mark.parametrize("workers", [(0, 2), (2, 1)])
def test_accumulated_updates_resume_with_the_next_batch_and_other_workers(
    config: DataConfig, tmp_path: Path, save_at: int, workers: tuple[int, int]
) -> None:
    checkpoint = tmp_path / "saved.ckpt"
    first, second = (replace(config, num_workers=number) for number in workers)
    whole = fit(first, Recorder(save_at, checkpoint), accumulate=2, max_steps=8)
    resumed = fit(second, Recorder(-1, checkpoint), ckpt_path=checkpoint, accumulate=2, max_steps=8)
    assert len(whole) == 14  # the last of 5 batches in a pass is an update of its own
    assert resumed == whole[save_at:]


@pytest.mark.parametrize("save_at", [1, 3, 5, 7])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_training_goes_on_with_the_next_sample_in_batches_of_another_size(
    config: DataConfig, tmp_path: Path, save_at: int, batch_size: int
) -> None:
    checkpoint = tmp_path / "saved.ckpt"
    seen = fit(config, Recorder(save_at, checkpoint))[:save_at]
    seen += fit(replace(config, batch_size=batch_size), Recorder(-1, checkpoint), ckpt_path=checkpoint)
    ids = [i for batch in seen for i in batch]
    assert len(ids) == save_at * 2 + (13 - save_at) * batch_size
    assert ids == SampleOrder([11], seed=0).take(0, len(ids))[0].tolist()


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
