"""Batches of shards that are read from beginning to end: order, resume, damage."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from http_files import serve
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dalle1.data.config import DataConfig
from dalle1.data.datamodule import PairDataModule
from dalle1.data.filters import FilterConfig
from dalle1.data.order import SampleOrder
from dalle1.data.preparation import Preparation
from dalle1.data.raw_sample import BadSampleError
from dalle1.data.stream import StreamLoader, StreamSettings, ValidationStreamLoader, VisitsDone

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]
MakeSamples = Callable[..., Members]


@pytest.fixture
def shards(write_shard: WriteShard, make_samples: MakeSamples) -> tuple[str, ...]:
    """Four shards of 5 to 8 samples, 26 in all."""
    starts = [0, 5, 11, 18, 26]
    pairs = itertools.pairwise(starts)
    return tuple(write_shard(f"{n}.tar", make_samples(b - a, start=a)) for n, (a, b) in enumerate(pairs))


Shards = tuple[tuple[str, ...], dict[str, int]]


@pytest.fixture(scope="module")
def samples_of_shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Shards of no to eight samples, one in five of which is bad, and the shard of each good one."""
    folder = tmp_path_factory.mktemp("shards")
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    shards, shard_of = [], {}
    for shard, n_samples in enumerate((3, 0, 8, 1, 5, 2, 7)):
        shards.append(str(folder / f"{shard}.tar"))
        with tarfile.open(shards[-1], "w") as tar:
            for i in range(n_samples):
                content = b"broken" if (shard + i) % 5 == 0 else picture.getvalue()
                member = tarfile.TarInfo(f"{shard}-{i}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                if content != b"broken":
                    shard_of[f"{shard}-{i}"] = shard
    return tuple(shards), shard_of


def settings(shards: tuple[str, ...], **changes: Any) -> StreamSettings:
    how: dict[str, Any] = {
        "shards": shards,
        "preparation": Preparation(image_size=4),
        "filters": FilterConfig(),
        "on_bad_sample": "error",
        "max_bad_fraction": 1.0,
        "batch_size": 2,
        "buffer": 6,
    }
    return StreamSettings(**(how | changes))


def loader(
    of: StreamSettings, *, seed: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> StreamLoader:
    order = SampleOrder([1] * len(of.shards), seed=seed)
    return StreamLoader(of, order, seed=seed, rank=rank, world_size=world_size, num_workers=num_workers)


def take(stream: StreamLoader, n_batches: int) -> list[str]:
    """Keys of the samples of the next batches."""
    return [key for _, batch in zip(range(n_batches), stream, strict=False) for key in batch["key"]]


def test_batches_have_every_sample_once_an_epoch_but_for_the_edges(shards: tuple[str, ...]) -> None:
    counts = Counter(take(loader(settings(shards)), 13 * 10))
    assert set(counts) == {f"{i:06d}" for i in range(26)}
    # What waits in the buffer is missing, or came from the next epoch.
    assert all(8 <= count <= 12 for count in counts.values())


def test_order_differs_between_epochs_and_seeds_and_is_the_same_again(shards: tuple[str, ...]) -> None:
    keys = take(loader(settings(shards)), 40)
    assert keys[:26] != keys[26:52]
    assert take(loader(settings(shards), seed=1), 40) != keys
    assert take(loader(settings(shards)), 40) == keys
    # Samples of several shards are in a batch of the buffer.
    assert keys[:26] != sorted(keys[:26])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_shards_are_dealt_to_devices_and_workers(shards: tuple[str, ...], num_workers: int) -> None:
    streams = [loader(settings(shards), rank=rank, world_size=2, num_workers=num_workers) for rank in range(2)]
    counts: Counter[str] = Counter()
    for stream in streams:
        counts.update(take(stream, 60))
        stream.close()
    assert set(counts) == {f"{i:06d}" for i in range(26)}


def test_fewer_shards_than_workers_is_no_matter(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    only = (write_shard("only.tar", make_samples(3)),)
    stream = loader(settings(only, batch_size=4), num_workers=3)
    assert set(take(stream, 9)) == {"000000", "000001", "000002"}
    stream.close()


def test_resumed_run_reads_what_was_begun_again_and_nothing_that_was_done(shards: tuple[str, ...]) -> None:
    epochs = 6
    for stop in (0, 1, 9, 20, 30):
        before = loader(settings(shards))
        seen = Counter(take(before, stop))
        state = before.state_dict()
        after = loader(settings(shards))
        after.load_state_dict(state)
        seen.update(take(after, 13 * epochs - stop))
        assert set(seen) == {f"{i:06d}" for i in range(26)}
        # At most the buffer's shards come once more: fewer samples are new to the same epoch.
        assert min(seen.values()) >= epochs - 3


def test_visits_that_are_done_are_those_whose_samples_were_all_handed_out(shards: tuple[str, ...]) -> None:
    of = settings(shards, buffer=1, batch_size=1)
    stream = loader(of)
    order = SampleOrder([1] * 4, seed=0)
    first_two = order.take(0, 2)[0].tolist()
    sizes = [5, 6, 7, 8]
    n_first = sizes[first_two[0]]
    take(stream, n_first - 1)
    assert stream.state_dict()["visits"] == {"all_below": 0, "others": []}
    # The buffer holds one sample of the next shard by the time the last one of the first leaves.
    take(stream, 2)
    assert stream.state_dict()["visits"] == {"all_below": 1, "others": []}
    resumed = loader(of)
    resumed.load_state_dict(stream.state_dict())
    assert len(set(take(resumed, sizes[first_two[1]]))) == sizes[first_two[1]]


@settings_of_hypothesis(max_examples=15, deadline=None)
@given(data=st.data())
def test_samples_of_visits_that_are_done_were_all_handed_out(samples_of_shards: Shards, data: st.DataObject) -> None:
    # Whatever devices there are before and after stops, and however many samples are bad or shards empty.
    shards, shard_of = samples_of_shards
    draw = data.draw
    of = settings(
        shards,
        on_bad_sample="skip",
        buffer=draw(st.sampled_from([1, 3, 12, 40])),
        batch_size=draw(st.sampled_from([1, 2, 5])),
    )
    seed = draw(st.integers(0, 99))
    done, seen = VisitsDone(), Counter[str]()
    for _ in range(3):
        world_size = draw(st.integers(1, 3))
        parts = []
        for rank in range(world_size):
            stream = loader(of, seed=seed, rank=rank, world_size=world_size)
            stream._done.add(range(done.all_below))
            stream._done.add(done.others)
            seen.update(take(stream, draw(st.integers(0, 40))))
            parts.append(stream._done)
        done = VisitsDone()
        for part in parts:
            done.add(range(part.all_below))
            done.add(part.others)
    order = SampleOrder([1] * len(shards), seed=seed)
    visited = Counter(int(order.take(visit, visit + 1)[0][0]) for visit in [*range(done.all_below), *done.others])
    assert all(seen[key] >= visited[shard] for key, shard in shard_of.items())


def test_resume_with_other_devices_goes_on(shards: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [loader(settings(shards), rank=rank, world_size=2) for rank in range(2)]
    for stream in streams:
        take(stream, 12)
    parts = [stream._done.state_dict() for stream in streams]
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda results, mine: results.__setitem__(slice(None), parts)
    )
    states = [stream.state_dict() for stream in streams]
    assert states[0]["visits"] == states[1]["visits"]
    done = VisitsDone()
    for part in parts:
        done.add(range(part["all_below"]))
        done.add(part["others"])
    assert states[0]["visits"] == done.state_dict()
    alone = loader(settings(shards), num_workers=2)
    alone.load_state_dict(states[0])
    assert set(take(alone, 40)) == {f"{i:06d}" for i in range(26)}
    alone.close()


def test_visits_done_are_a_number_and_a_few_others() -> None:
    done = VisitsDone()
    done.add([0, 2, 5])
    assert done.state_dict() == {"all_below": 1, "others": [2, 5]}
    done.add([1, 2])
    assert done.state_dict() == {"all_below": 3, "others": [5]}
    done.add_below(5)
    assert done.state_dict() == {"all_below": 6, "others": []}
    done.add_below(2)
    done.add([8])
    done.add_below(7)
    assert done.state_dict() == {"all_below": 7, "others": [8]}
    left = done.left()
    assert [next(left) for _ in range(3)] == [7, 9, 10]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"seed": 1}, "seed 1, not 0"),
        ({"n_samples": 9}, r"the order of shards can only be .*: n_samples 9, not 4; restore them"),
    ],
)
def test_state_of_another_stream_is_refused(shards: tuple[str, ...], state: dict[str, int], message: str) -> None:
    stream = loader(settings(shards))
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(stream.state_dict() | state)
    with pytest.raises(ValueError, match=r"indexed cannot go on with a stream"):
        stream.load_state_dict({"samples_handed_out": 3})


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_shows_every_sample_once(shards: tuple[str, ...], world_size: int, num_workers: int) -> None:
    seen: list[str] = []
    for rank in range(world_size):
        stream = ValidationStreamLoader(settings(shards), rank=rank, world_size=world_size, num_workers=num_workers)
        for _ in range(2):
            keys = [key for batch in stream for key in batch["key"]]
        seen += keys
    assert sorted(seen) == [f"{i:06d}" for i in range(26)]


def test_first_samples_are_those_of_the_first_shards(shards: tuple[str, ...]) -> None:
    expected = [f"{i:06d}" for i in range(7)]
    assert [sample["key"] for sample in loader(settings(shards)).first_samples(7)] == expected
    assert [sample["key"] for sample in ValidationStreamLoader(settings(shards)).first_samples(7)] == expected


def test_damage_is_passed_over_counted_and_named(
    shards: tuple[str, ...], write_shard: WriteShard, make_samples: MakeSamples, tmp_path: Path
) -> None:
    cut = write_shard("cut.tar", [*make_samples(2, start=50), ("bad.png", b"broken")])
    with open(cut, "r+b") as file:
        file.truncate(4500)
    gone = str(tmp_path / "gone.tar")
    of = settings((*shards, cut, gone), on_bad_sample="skip")
    stream = loader(of)
    batches = [batch for _, batch in zip(range(60), stream, strict=False)]
    assert all(len(batch["key"]) == 2 for batch in batches)
    kinds = stream.findings.count()
    assert kinds == {"shard is truncated": 1, "shard cannot be read": 1}
    assert any(gone in name for name in stream.findings.named)
    with pytest.raises(BadSampleError, match=r"shard '.*gone\.tar' cannot be read .*data\.on_bad_sample=skip"):
        take(loader(settings((gone,))), 1)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil.png", b"x")], r"leads out of it, '\.\./evil\.png'; .*, or set data\.on_bad_sample=skip$"),
        ([("a.png", b"x"), ("a.jpg", b"y")], r"two files of a kind; .*, or set data\.on_bad_sample=skip$"),
    ],
)
def test_damage_is_an_error_by_default_and_not_taken_for_a_bad_connection(
    write_shard: WriteShard, make_samples: MakeSamples, members: Members, message: str
) -> None:
    odd = write_shard("odd.tar", [*members, *make_samples(9)])
    with pytest.raises(BadSampleError, match=message):
        take(loader(settings((odd,), preparation=Preparation(image_size=1))), 9)


def test_damage_that_is_met_in_each_epoch_is_logged_once(
    write_shard: WriteShard, make_samples: MakeSamples, caplog: pytest.LogCaptureFixture
) -> None:
    odd = write_shard("odd.tar", [("../evil.png", b"x"), *make_samples(4)])
    take(loader(settings((odd,), on_bad_sample="skip")), 20)
    assert sum("evil" in message for message in caplog.messages) == 1


def test_shards_without_any_sample_end_the_stream(tmp_path: Path) -> None:
    gone = tuple(str(tmp_path / f"{i}.tar") for i in range(3))
    with pytest.raises(
        ValueError, match=r"got none from 10 in a row, the last '.*\.tar' \(shard cannot be read \(3\)\)"
    ):
        take(loader(settings(gone, on_bad_sample="skip")), 1)


def test_key_that_is_no_utf8_is_drawn_for_like_others(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    picture = make_samples(1)[0][1]
    odd = write_shard("odd.tar", [(f"caf\udce9{i}.png", picture) for i in range(4)])
    of = settings((odd,), preparation=Preparation(image_size=4, augmentation="dvae"))
    assert set(take(loader(of), 8)) == {f"caf\udce9{i}" for i in range(4)}


def test_bad_samples_alone_end_the_stream(write_shard: WriteShard) -> None:
    bad = write_shard("bad.tar", [(f"{i}.png", b"broken") for i in range(3)])
    with pytest.raises(ValueError, match=r"must be good, got 1000 bad ones in a row; the last: picture of"):
        take(loader(settings((bad,), on_bad_sample="skip")), 1)


def test_filters_leave_out_and_count(shards: tuple[str, ...]) -> None:
    # Captions are "number i", metadata {"number": i}.
    stream = loader(settings(shards, filters=FilterConfig(json={"number": {"max": 9}})))
    assert set(take(stream, 40)) == {f"{i:06d}" for i in range(10)}
    assert set(stream.dropped) == {"json number above 9"}
    validation = ValidationStreamLoader(settings(shards, filters=FilterConfig(json={"number": {"max": 9}})))
    assert [len(batch["key"]) for batch in validation] == [2] * 5
    assert validation.dropped == {"json number above 9": 16}


class Recorder(pl.LightningModule):
    """Notes the keys that it is given; saves a checkpoint after a number of batches."""

    def __init__(self, save_at: int, checkpoint: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.keys: list[str] = []
        self._save_at = save_at
        self._checkpoint = checkpoint

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        self.keys += batch["key"]
        return self.weight.sum()

    def on_train_batch_end(self, *_: object) -> None:
        if len(self.keys) == 2 * self._save_at:
            self.trainer.save_checkpoint(self._checkpoint)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        assert batch["pixels"].shape[1:] == (3, 4, 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_trainer_trains_validates_and_resumes_from_a_web_server(shards: tuple[str, ...], tmp_path: Path) -> None:
    def fit(address: str, module: Recorder, ckpt_path: Path | None = None) -> PairDataModule:
        config = DataConfig(
            train=f"{address}/{{0..3}}.tar",
            val=f"{address}/0.tar",
            image_size=4,
            batch_size=2,
            stream_buffer=4,
            num_workers=2,
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=30,
            max_epochs=-1,
            val_check_interval=10,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = PairDataModule(config)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return data

    checkpoint = tmp_path / "saved.ckpt"
    with serve(Path(shards[0]).parent) as (address, asked):
        whole, resumed = Recorder(20, checkpoint), Recorder(-1, checkpoint)
        data = fit(address, whole)
        assert data.count_findings() == {}
        assert len(whole.keys) == 60
        assert len(set(whole.keys)) > 20
        fit(address, resumed, checkpoint)
    assert len(resumed.keys) == 20
    state = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert state["visits"]["all_below"] + len(state["visits"]["others"]) >= 2
    assert {path for path in asked if path.endswith(".tar")} == {f"/{i}.tar" for i in range(4)}


def test_tokenizer_reads_captions_of_a_stream(shards: tuple[str, ...]) -> None:
    config = DataConfig(train=list(shards), backend="stream", image_size=4, batch_size=2)
    data = PairDataModule(config)
    assert list(data.train_captions()) == [f"number {i}" for i in range(26)]
    assert data.n_samples_used() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "https://h/a.tar", "backend": "indexed"}, r"indexed must have local shards, got 'https://h/a\.tar'"),
        ({"train": "https://h/a.tar", "cache_images": True}, "cache_images must be false for a stream, got true"),
        (
            {"train": "https://h/a.tar", "filters": FilterConfig(near_duplicates=2)},
            "near_duplicates must be null for a stream",
        ),
        ({"train": "pipe:touch x"}, r"only run with data\.allow_pipe=true"),
        ({"backend": "stream", "tokens": "x", "train": "a.tar"}, r"always indexed, got data\.backend=stream"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    config = DataConfig(**({"val": "a.tar", "image_size": 4, "batch_size": 2} | changes))
    with pytest.raises(ValueError, match=message):
        PairDataModule(config).setup("fit")
