"""DDP with our hook: what arrives in gradients, what is logged, saved and gone on from; what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import environment
from stage_runs import Train, last
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dalle1.checkpoint import load_transformer, read_checkpoint, weights_sha256
from dalle1.training.communication import Bf16Reducer, average_bucket, handed_bytes
from dalle1.training.communication_callback import CommunicationCallback
from dalle1.training.powersgd import PowerSGD, PowerSGDReducer

DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1")
POWERSGD = (*DDP, "communication=powersgd", "communication.shards=2")


@pytest.fixture(autouse=True)
def _no_group_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Lightning leaves its process group, threads, and what it tells child processes, to the end of the process.
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    for earlier in ("tokenizer", "dvae"):
        shutil.copytree(trained / earlier, tmp_path / earlier)
    return tmp_path


def states(results: Path) -> list[str]:
    return sorted(path.name for path in (results / "transformer" / "checkpoints" / "powersgd").iterdir())


def logged(results: Path, stage: str, name: str) -> list[float]:
    with next((results / stage).glob("logs/*/metrics.csv")).open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def one_process(network: nn.Module, reducer: PowerSGDReducer | Bf16Reducer, tmp_path: Path) -> DistributedDataParallel:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    wrapped = DistributedDataParallel(network)
    wrapped.register_comm_hook(reducer, average_bucket)
    return wrapped


def test_ddp_takes_the_hook_and_gives_it_what_was_accumulated(tmp_path: Path) -> None:
    network = nn.Sequential()
    network.add_module("blocks", nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 1)))
    reducer = PowerSGDReducer(PowerSGD(rank=2, shards=1), network, seed=0)
    wrapped = one_process(network, reducer, tmp_path)
    x = torch.randn(2, 5, 10)
    expected = torch.zeros(6, 10)
    applied = torch.zeros(6, 10)
    for update in range(3):  # DDP makes other buckets after the first
        batches = x + update
        loss = sum(network(batch).square().mean() for batch in batches)
        (whole,) = torch.autograd.grad(loss, network.blocks[0].weight)
        with wrapped.no_sync():
            wrapped(batches[0]).square().mean().backward()
        assert reducer.sent_bytes == update * handed_bytes(PowerSGD(rank=2, shards=1), network)
        wrapped(batches[1]).square().mean().backward()
        expected += whole
        applied += network.blocks[0].weight.grad
        wrapped.zero_grad()
    torch.testing.assert_close(applied + reducer.errors()["blocks.0.weight"], expected)
    assert reducer.plain_bytes == 3 * 4 * sum(each.numel() for each in network.parameters())


def test_bf16_under_ddp_is_the_gradient_rounded(tmp_path: Path) -> None:
    network, x = nn.Linear(10, 6), torch.randn(5, 10)
    expected = torch.autograd.grad(network(x).square().mean(), list(network.parameters()))
    wrapped = one_process(network, Bf16Reducer(), tmp_path)
    wrapped(x).square().mean().backward()
    for weight, gradient in zip(network.parameters(), expected, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, gradient.bfloat16().float())


def test_powersgd_trains_logs_what_it_sends_and_its_states_go_with_their_checkpoints(
    train: Train, results: Path
) -> None:
    options = ("callbacks.checkpoint.every_n_steps=2", "+trainer.accumulate_grad_batches=2")
    train(results, "transformer", *POWERSGD, *options)
    assert states(results) == ["step0000006-rank0000.pt", "step0000008-rank0000.pt"]
    network = load_transformer(last(results, "transformer")).model.requires_grad_(True)
    handed = handed_bytes(PowerSGD(shards=2), network)
    plain = 4 * sum(each.numel() for each in network.parameters())
    assert logged(results, "transformer", "perf/sent_megabytes") == pytest.approx([handed / 1e6] * 8)
    assert logged(results, "transformer", "perf/sent_saved") == pytest.approx([1 - handed / plain] * 8)
    content = torch.load(results / "transformer/checkpoints/powersgd/step0000008-rank0000.pt", weights_only=True)
    assert (content["step"], content["rank"], content["world_size"]) == (8, 0, 1)
    assert len(content["errors"]) == 4 * 3
    assert all(each.norm() > 0 for each in content["errors"].values())


def test_state_is_there_before_its_checkpoint(
    train: Train, results: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = torch.save

    def die(content: dict[str, object], file: object) -> None:
        save(content, file)
        if content.get("global_step") == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            train(results, "transformer", *POWERSGD)
    assert states(results) == ["step0000004-rank0000.pt", "step0000008-rank0000.pt"]
    assert read_checkpoint(last(results, "transformer"))["global_step"] == 4
    before = torch.load(results / "transformer/checkpoints/powersgd/step0000008-rank0000.pt", weights_only=True)
    train(results, "transformer", *POWERSGD)
    after = torch.load(results / "transformer/checkpoints/powersgd/step0000008-rank0000.pt", weights_only=True)
    assert weights_sha256(after["errors"]) == weights_sha256(before["errors"])
    assert not [message for message in caplog.messages if "is lost" in message]


@pytest.mark.parametrize("words", ["[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0", "other"])
def test_full_disk_costs_what_has_not_been_sent_and_another_error_ends_the_run_before_the_checkpoint(
    train: Train, results: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr("dalle1.training.communication_callback.save_state", fail)
    if words == "other":
        with pytest.raises(RuntimeError, match="other"):
            train(results, "transformer", *POWERSGD)
        assert not last(results, "transformer").exists()
    else:
        train(results, "transformer", *POWERSGD)
        assert last(results, "transformer").exists()
        assert "what PowerSGD has not sent after update 8 is not saved: [enforce" in caplog.text


def test_nothing_of_a_skipped_update_is_sent_later(
    train: Train, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    forget = PowerSGDReducer.forget_errors

    def note(self: PowerSGDReducer) -> None:
        seen.append(any(error.any() for error in self.errors().values()))
        forget(self)
        assert not any(error.any() for error in self.errors().values())

    monkeypatch.setattr(PowerSGDReducer, "forget_errors", note)
    poison = ("+callbacks.poison._target_=poison.Poison", "+callbacks.poison.step=5", "+callbacks.poison.factor=1e4")
    train(results, "transformer", *POWERSGD, *poison, "callbacks.bad_updates.loss_window=3")
    assert seen == [True]


def test_scaled_resblocks_go_with_it(train: Train, results: Path) -> None:
    few = ("optim.max_steps=2", "trainer.val_check_interval=2", "~callbacks.throughput", "+trainer.limit_val_batches=1")
    path = results / "transformer" / "checkpoints" / "powersgd" / "step0000002-rank0000.pt"
    errors = {}
    for scaled in ("false", "true"):
        train(results, "transformer", *POWERSGD, *few, f"optim.resblock_gradient_scaling={scaled}")
        errors[scaled] = torch.load(path, weights_only=True)["errors"]
        shutil.rmtree(results / "transformer")
    # With the scale in them they would be 2^13 times as large.
    for name, error in errors["true"].items():
        assert 0.9 < error.norm() / errors["false"][name].norm() < 1.1, name


def test_two_processes_keep_the_same_weights_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("two_devices.py"))]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment(), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for each in found:
        assert each["resumed"] == each["whole"]
        # Seven updates: two factors of two pieces of rank 2 for each of the matrices, in 2 bytes; others in 4.
        assert each["sent"] == 7 * (2 * 2 * 2 * 2 * (15 + 16) + 4 * (30 + 16 + 16 * 4 + 4))
        assert each["plain"] == 7 * 4 * (16 * 30 + 30 + 30 * 16 + 16 + 16 * 4 + 4)
    assert found[0]["whole"]["weights"] == found[1]["whole"]["weights"]
    assert found[0]["whole"]["queries"] == found[1]["whole"]["queries"]
    assert found[0]["whole"]["errors"] != found[1]["whole"]["errors"]


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (
            "dvae",
            ["communication=bf16"],
            "communication must be plain without DDP, .* got communication=bf16 with SingleDeviceStrategy; use trainer",
        ),
        (
            "dvae",
            [*DDP, "communication=powersgd"],
            r"communication=powersgd must have matrices in blocks .*, got none of \d+ weights in a DVAE; use communic",
        ),
        (
            "transformer",
            [*DDP, "communication=powersgd", "communication.rank=1000"],
            r"that are larger than their factors, got none of \d+ weights in a DalleTransformer",
        ),
    ],
)
def test_what_cannot_be_sent_so_is_refused(
    train: Train, results: Path, stage: str, options: list[str], message: str
) -> None:
    if stage == "dvae":
        shutil.rmtree(results / "dvae")
    with pytest.raises(ValueError, match=message):
        train(results, stage, *options)
    assert not (results / stage).exists() or not list((results / stage).iterdir())


def test_without_a_run_it_saves_nothing(tmp_path: Path) -> None:
    callback = CommunicationCallback(PowerSGD(), tmp_path, seed=0)
    callback.on_save_checkpoint(None, None, {})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
