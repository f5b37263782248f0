"""A run's network without its training: which weights, out of what, and what takes the result."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from dalle1 import export
from dalle1.checkpoint import load_clip, load_dvae, load_transformer, read_checkpoint, weights_sha256
from dalle1.models.dvae import DVAE
from dalle1.models.transformer import DalleTransformer
from dalle1.pipeline import Pipeline
from dalle1.tokenizers.text import TextTokenizer
from dalle1.tokenizers.text_file import load_text_tokenizer
from dalle1.training.sharded_checkpoints import write_sharded

Command = Callable[..., int]
Write = Callable[..., Path]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls the command in this process and returns its exit code."""

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["dalle1.export", *map(str, arguments)])
        try:
            export.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


@pytest.fixture
def runs(run_directory: Path, tmp_path: Path) -> Path:
    """Runs of all stages."""
    shutil.copytree(run_directory / "runs" / "shapes", tmp_path / "shapes")
    return tmp_path / "shapes"


@pytest.fixture
def group() -> Iterator[None]:
    """This process as all devices of a run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def averaged(
    runs: Path,
    make_transformer: Callable[..., DalleTransformer],
    text_tokenizer: TextTokenizer,
    write_checkpoint: Write,
) -> Path:
    """A transformer's run with an average and an optimizer's state."""
    average = make_transformer(seed=5)
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    write_checkpoint(
        runs / "transformer" / "checkpoints" / "last.ckpt",
        make_transformer(seed=4),
        extra={"ema": average.state_dict(), "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1}]}]},
        text_tokenizer=text_tokenizer,
        dvae_sha256=load_dvae(runs / "dvae" / "checkpoints" / "last.ckpt").sha256,
    )
    return runs / "transformer"


def in_parts(run: Path) -> Path:
    """The same run with its checkpoint in parts."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    mesh = init_device_mesh("cpu", (1,))
    for entry in ("state_dict", "ema"):
        content[entry] = {name: distribute_tensor(tensor, mesh) for name, tensor in content[entry].items()}
    moments = content["optimizer_states"][0]["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        moments[name] = distribute_tensor(moments[name], mesh)
    write_sharded(run / "checkpoints" / "last.ckpt", content)
    return run


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(("option", "seed"), [((), 5), (("weights=ema",), 5), (("weights=trained",), 4)])
def test_weights_are_the_average_unless_the_trained_ones_are_asked_for(
    averaged: Path,
    make_transformer: Callable[..., DalleTransformer],
    call: Command,
    is_sharded: bool,
    option: tuple[str, ...],
    seed: int,
) -> None:
    run = in_parts(averaged) if is_sharded else averaged
    assert call(run, *option) == 0
    assert sorted(path.name for path in (run / "exported").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded = load_transformer(run / "exported")
    assert loaded.sha256 == weights_sha256(make_transformer(seed=seed).state_dict())
    assert (loaded.step, loaded.dvae_sha256) == (7, load_transformer(run / "checkpoints" / "last.ckpt").dvae_sha256)


@pytest.mark.usefixtures("group")
def test_checkpoint_in_parts_is_that_file(averaged: Path) -> None:
    whole = read_checkpoint(averaged / "checkpoints" / "last.ckpt")
    parts = read_checkpoint(in_parts(averaged) / "checkpoints" / "last.ckpt", average=False)
    assert weights_sha256(parts["state_dict"]) == weights_sha256(whole["state_dict"])
    assert {name: parts[name] for name in ("dalle1", "global_step")} == {
        name: whole[name] for name in ("dalle1", "global_step")
    }
    assert parts["ema"] == {}
    assert parts["optimizer_states"] == [{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1}]}]


def test_everything_takes_the_result(runs: Path, call: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, following in (
        ("dvae", "python train.py stage=transformer dvae="),
        ("clip", "python sample.py rerank=clip rerank.model="),
        ("transformer", "python sample.py transformer="),
    ):
        assert call(runs / stage, f"out={runs}/{stage}-alone") == 0
        first, written, last = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{stage} of ")
        assert first.endswith(" weights after 7 updates, as trained")
        assert written.startswith(f"written: {runs}/{stage}-alone (hash of the weights ")
        assert last.startswith(f"next:    {following}{runs}/{stage}-alone")
    pipeline = Pipeline.from_checkpoint(transformer=runs / "transformer-alone", dvae=runs / "dvae-alone")
    assert pipeline.transformer.model.config.n_layers == 4
    assert load_clip(runs / "clip-alone").text_tokenizer is not None
    tokenizer = load_text_tokenizer(runs / "transformer-alone" / "tokenizer.json", vocab_size=1, seq_len=1)
    loaded = load_transformer(runs / "transformer-alone").text_tokenizer
    assert loaded is not None
    assert tokenizer.to_dict() == loaded.to_dict()
    assert not (runs / "dvae-alone" / "tokenizer.json").exists()


def test_single_checkpoint_can_be_exported(runs: Path, call: Command, make_dvae: Callable[..., DVAE]) -> None:
    assert call(runs / "dvae" / "checkpoints" / "last.ckpt", "--out", runs / "out") == 0
    assert load_dvae(runs / "out").sha256 == weights_sha256(make_dvae().state_dict())
    assert json.loads((runs / "out" / "config.json").read_text())["kind"] == "dvae"


def test_file_is_mapped_and_never_read_in_whole(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, asked = torch.load, []

    def spy(*arguments: object, **options: object) -> object:
        asked.append(options["mmap"])
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", spy)
    export.export(runs / "dvae")
    assert asked == [True]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("dvae", "weights=ema"), 1, "must hold an average for weights=ema, its run kept none; leave weights= out"),
        (("dvae", "weights=best"), 2, "weights must be ema or trained, got 'best'"),
        (("dvae", "outt=x"), 2, "there is no option 'outt'; there are out, weights"),
        (("dvae/checkpoints/last.ckpt",), 2, "out must be given for a single checkpoint, as in out=last-exported"),
        (("nothing",), 1, "no run and no checkpoint at 'nothing'; correct the path"),
        ((".",), 1, "must be a run's directory with checkpoints/last.ckpt, or a checkpoint of one, it is neither"),
        (("dvae", "out=clip"), 1, "out must not exist yet or be an empty directory, got 'clip'; choose another one"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    runs: Path,
    call: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(runs)
    before = sorted(runs.rglob("*"))
    assert call(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(runs.rglob("*")) == before


@pytest.mark.usefixtures("group")
def test_damaged_checkpoint_in_parts_is_refused(averaged: Path) -> None:
    path = in_parts(averaged) / "checkpoints" / "last.ckpt"
    file = next(path.glob("shard-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: 'shard-.*' has another checksum; delete it, or copy it again"):
        export.export(averaged)
    assert not (averaged / "exported").exists()


@pytest.mark.usefixtures("group")
def test_checkpoint_in_parts_that_cannot_be_written_leaves_what_there_was(
    averaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = in_parts(averaged) / "checkpoints" / "last.ckpt"
    before = weights_sha256(read_checkpoint(path)["ema"])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for where in ("torch.distributed.checkpoint.filesystem.os.fsync", "dalle1.training.sharded_checkpoints.torch.save"):
        with monkeypatch.context() as patched:
            patched.setattr(where, full)
            with pytest.raises(OSError, match="No space left") as raised:
                write_sharded(path, {"weight": distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)))})
        assert raised.value.errno == 28
        assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    assert weights_sha256(read_checkpoint(path)["ema"]) == before
