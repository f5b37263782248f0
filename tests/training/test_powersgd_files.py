"""PowerSGD's state beside the checkpoints: each device's own, that of other numbers of devices, lost and damaged."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle1.training.powersgd_files import load_state, remove_orphans, save_state, state_path

NAME = "blocks.0.weight"


def error(rank: int) -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(rank))


def save(directory: Path, world_size: int, step: int = 8) -> None:
    for rank in range(world_size):
        queries = {NAME: torch.full((1, 10, 2), 3.0)}
        save_state(directory, step=step, rank=rank, world_size=world_size, errors={NAME: error(rank)}, queries=queries)


def test_device_goes_on_with_its_own(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for rank in range(3):
        state = load_state(tmp_path, step=8, rank=rank, world_size=3)
        assert state is not None
        assert torch.equal(state[0][NAME], error(rank))
        assert torch.equal(state[1][NAME], torch.full((1, 10, 2), 3.0))


@pytest.mark.parametrize(("before", "now"), [(3, 2), (1, 4), (4, 1), (2, 3)])
def test_other_devices_get_the_mean_so_that_their_mean_stays(
    tmp_path: Path, before: int, now: int, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, before)
    with caplog.at_level(logging.INFO):
        states = [load_state(tmp_path, step=8, rank=rank, world_size=now) for rank in range(now)]
    loaded = torch.stack([state[0][NAME] for state in states if state is not None])
    assert len(loaded) == now
    expected = torch.stack([error(rank) for rank in range(before)]).double().mean(0)
    torch.testing.assert_close(loaded.double().mean(0), expected)
    assert caplog.messages == [f"of what PowerSGD had not sent on {before} devices, each of {now} gets the mean"]


@pytest.mark.parametrize("now", [2, 3])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "another update's", "another run's"])
def test_without_a_whole_state_it_begins_at_zero_and_says_so(
    tmp_path: Path, damage: str, now: int, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 2)
    path = state_path(tmp_path, 8, 1)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, 300)
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        place = content.find(error(1).numpy().tobytes())
        content[place + 17] ^= 1
        path.write_bytes(content)
    elif damage == "another update's":
        save(tmp_path, 2, step=7)
        state_path(tmp_path, 7, 1).replace(path)
    else:
        save_state(tmp_path, step=8, rank=1, world_size=5, errors={}, queries={})
        now += now == 2  # which one is right, two devices cannot know
    assert load_state(tmp_path, step=8, rank=1, world_size=now) is None
    (message,) = caplog.messages
    assert message.startswith("what PowerSGD had not sent after update 8 is lost, training goes on without it: ")
    assert caplog.records[0].levelno == logging.WARNING


def test_states_without_a_checkpoint_go_but_those_that_are_gone_on_from(tmp_path: Path) -> None:
    for step in (4, 6, 8):
        save(tmp_path, 2, step)
    (tmp_path / "step0000004.ckpt").touch()
    remove_orphans(tmp_path, 6)
    kept = sorted(path.name for path in (tmp_path / "powersgd").iterdir())
    assert kept == [f"step000000{step}-rank000{rank}.pt" for step in (4, 6) for rank in (0, 1)]
