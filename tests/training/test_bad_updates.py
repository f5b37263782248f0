"""Updates that go wrong: found on all devices alike before the weights change, named, and left out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import poison
import pytest
import torch
from launching import call
from stage_runs import STAGES, Train, last

from dalle1.checkpoint import read_checkpoint, weights_sha256
from dalle1.run_status import read_status
from dalle1.training.bad_updates import BadUpdates
from dalle1.training.loss_watch import LossWatch
from dalle1.training.stage_module import StageModule

POISON = "+callbacks.poison._target_=poison.Poison"
QUICK = "~callbacks.pictures"
RETURN = ("callbacks.bad_updates.action=return", QUICK)


@pytest.fixture(autouse=True)
def _no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.training.run.save_curves", lambda *_: None)  # which take as long as the training
    for seen in (poison.BATCHES, poison.LOSSES):
        seen.clear()


def log_of(results: Path, stage: str = "dvae") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / stage / "bad_updates.jsonl").read_text().splitlines()]


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, average and Adam's moments of two checkpoints."""
    mine, theirs = read_checkpoint(one), read_checkpoint(other)
    assert mine["global_step"] == theirs["global_step"]
    for part in ("state_dict", "ema"):
        assert weights_sha256(mine[part]) == weights_sha256(theirs[part])
    moments = [content["optimizer_states"][0]["state"] for content in (mine, theirs)]
    assert all(torch.equal(moments[0][name]["exp_avg_sq"], state["exp_avg_sq"]) for name, state in moments[1].items())


@pytest.mark.parametrize("stage", STAGES)
def test_skipped_update_is_one_without_a_gradient(
    train: Train, trained: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("poisoned", "reference"):
        for earlier in ("tokenizer", "dvae"):
            if earlier != stage:
                shutil.copytree(trained / earlier, tmp_path / run / earlier)
    summary = train(tmp_path / "poisoned", stage, QUICK, POISON, "+callbacks.poison.step=5")
    assert summary["bad_updates"] == 1
    (line,) = log_of(tmp_path / "poisoned", stage)
    assert (line["update"], line["loss"], line["grad_norm"]) == (6, None, None)
    assert line["keys"] == [dict(poison.BATCHES)[5]]

    clip = StageModule.configure_gradient_clipping

    def without_gradient(self: Any, optimizer: Any, *rest: Any, **options: Any) -> None:
        clip(self, optimizer, *rest, **options)
        if self.global_step == 5:
            optimizer.zero_grad(set_to_none=True)

    monkeypatch.setattr(StageModule, "configure_gradient_clipping", without_gradient)
    assert "bad_updates" not in train(tmp_path / "reference", stage, QUICK)
    assert_same_state(last(tmp_path / "poisoned", stage), last(tmp_path / "reference", stage))


def test_nan_is_a_bad_update_and_no_overflow_of_scaled_resblocks(train: Train, trained: Path, tmp_path: Path) -> None:
    for earlier in ("tokenizer", "dvae"):
        shutil.copytree(trained / earlier, tmp_path / earlier)
    options = ("optim.resblock_gradient_scaling=true", QUICK, POISON, "+callbacks.poison.step=5")
    assert train(tmp_path, "transformer", *options)["bad_updates"] == 1
    content = read_checkpoint(last(tmp_path, "transformer"))
    assert content["global_step"] == 8
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())
    # The seven losses of the updates that were made.
    assert len(content["callbacks"]["BadUpdates"]["losses"]) == 7


def test_exploding_loss_of_several_batches_is_skipped_and_all_of_them_named(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The second of two batches, of an update that would be made otherwise: all numbers are finite.
    where = ("+callbacks.poison.step=3", "+callbacks.poison.part=1", "+callbacks.poison.factor=100")
    watch = ("callbacks.bad_updates.loss_window=3", "optim.codebook_start_step=0", "optim.max_steps=5")
    options = ("+trainer.accumulate_grad_batches=2", "trainer.val_check_interval=20", QUICK, POISON)
    assert train(tmp_path, "dvae", *options, *where, *watch)["bad_updates"] == 1
    (line,) = log_of(tmp_path)
    assert line["update"] == 4
    keys = [key for step, batch in poison.BATCHES if step == 3 for key in batch]
    assert len(keys) == 8
    assert line["keys"] == [keys]
    assert line["loss"] == pytest.approx((poison.LOSSES[6] + poison.LOSSES[7]) / 2)
    assert "deviations above that of the last 3 updates" in line["why"]
    assert math.isfinite(line["grad_norm"])
    (said,) = [message for message in caplog.messages if "is bad" in message]
    assert said.startswith("update 4 is bad: its loss is ")
    assert said.endswith(f"; skipped; its samples: {', '.join(keys)}")


def test_no_loss_is_compared_with_those_before_the_codes_began(trained: Path) -> None:
    for step, n_since in ((4, 1), (8, 5)):
        content = read_checkpoint(last(trained, "dvae").with_name(f"step000000{step}.ckpt"))
        assert len(content["callbacks"]["BadUpdates"]["losses"]) == n_since


def test_return_goes_on_from_the_checkpoint_with_the_data_after_the_bad_update(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "healthy", "dvae", POISON, QUICK, "optim.max_steps=10")
    healthy = list(poison.BATCHES)
    poison.BATCHES.clear()
    bad = (*RETURN, POISON, "+callbacks.poison.step=5")
    assert train(tmp_path / "whole", "dvae", *bad)["bad_updates"] == 1
    # Updates 5 and 6 are made again, with the samples that came after them.
    assert healthy[:6] + [(step - 2, keys) for step, keys in healthy[6:]] == poison.BATCHES
    assert log_of(tmp_path / "whole")[0]["done"] == "going back to update 4"

    # The process dies between the return and the next checkpoint.
    def die(*_: Any) -> None:
        if (tmp_path / "resumed/dvae/checkpoints/return.json").exists():
            raise SystemExit(1)

    poison.BATCHES.clear()
    with monkeypatch.context() as patch:
        patch.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_start", die)
        with pytest.raises(SystemExit):
            train(tmp_path / "resumed", "dvae", *bad)
    assert train(tmp_path / "resumed", "dvae", *RETURN)["bad_updates"] == 1
    assert_same_state(last(tmp_path / "whole", "dvae"), last(tmp_path / "resumed", "dvae"))
    states = [read_checkpoint(last(tmp_path / run, "dvae"))["callbacks"] for run in ("whole", "resumed")]
    assert states[0] == states[1]

    # And by hand: a checkpoint of update 4 whose place in the data is that of update 6.
    (tmp_path / "hand" / "dvae" / "checkpoints").mkdir(parents=True)
    content = read_checkpoint(tmp_path / "whole/dvae/checkpoints/step0000004.ckpt")
    (loader,) = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader["samples_handed_out"] == 16
    loader["samples_handed_out"] = 24
    torch.save(content, last(tmp_path / "hand", "dvae"))
    train(tmp_path / "hand", "dvae", QUICK)
    assert_same_state(last(tmp_path / "whole", "dvae"), last(tmp_path / "hand", "dvae"))


def test_return_in_a_stream_goes_on_after_the_shards_that_were_done(train: Train, tmp_path: Path) -> None:
    # Its one shard of 40 samples has been read once by update 11, and 12 to 16 do not get to its end again.
    stream = ("data.backend=stream", "data.stream_buffer=1", "data.cache_images=false")
    bad = (POISON, "+callbacks.poison.step=11", "callbacks.checkpoint.keep_last=9")
    train(tmp_path, "dvae", *RETURN, *stream, *bad, "optim.max_steps=12")
    for step, n_done in ((8, 0), (12, 1)):
        content = read_checkpoint(last(tmp_path, "dvae").with_name(f"step{step:07d}.ckpt"))
        (loader,) = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert loader["visits"]["all_below"] == n_done


def test_before_the_first_checkpoint_return_skips(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path, "dvae", *RETURN, POISON, "+callbacks.poison.step=2")["bad_updates"] == 1
    assert log_of(tmp_path)[0]["done"] == "skipped"
    assert [step for step, _ in poison.BATCHES] == list(range(8))


def test_stop_ends_the_run_with_a_good_checkpoint(train: Train, tmp_path: Path) -> None:
    stop = ("callbacks.bad_updates.action=stop", POISON, "+callbacks.poison.step=5")
    with pytest.raises(
        ValueError,
        match=r"must have a finite loss and gradient, but update 6 is bad: its loss is nan .* no checkpoint has it",
    ):
        train(tmp_path, "dvae", *stop, QUICK)
    content = read_checkpoint(last(tmp_path, "dvae"))
    assert content["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())
    assert json.loads((tmp_path / "dvae" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("action", ["skip", "return"])
def test_too_many_end_the_run_over_resumes_and_returns_too(train: Train, tmp_path: Path, action: str) -> None:
    bad = (f"callbacks.bad_updates.action={action}", POISON, "+callbacks.poison.step=4", "+callbacks.poison.times=100")
    few = "callbacks.bad_updates.max_bad_updates=2"
    if action == "return":  # the same update is bad again and again
        with pytest.raises(
            ValueError, match=r"at most 2 of the last 1000 updates may be bad .* got 3, and update 5 is bad"
        ):
            train(tmp_path, "dvae", *bad, few, QUICK)
        return
    # One in each start.
    for step, steps in ((2, 5), (6, 7)):
        train(tmp_path, "dvae", QUICK, POISON, f"+callbacks.poison.step={step}", few, f"optim.max_steps={steps}")
        poison.BATCHES.clear()
    with pytest.raises(ValueError, match=r"at most 2 of the last 1000 .* got 3, and update 8 is bad"):
        train(tmp_path, "dvae", QUICK, POISON, "+callbacks.poison.step=7", few)


def test_two_devices_decide_return_and_miss_a_checkpoint_together(tmp_path: Path, shapes: Path) -> None:
    options = [
        *("stage=dvae", "image_size=16", "grid_size=4", "image_vocab_size=16", "trainer.accelerator=cpu"),
        *("model.patch_size=4", "model.n_hid=16", "model.n_init=16", "optim.max_steps=4", "optim.batch_size=4"),
        *(
            "optim.warmup_steps=1",
            "optim.codebook_start_step=0",
            "data.recipe=null",
            f"data.train={shapes}/train-*.tar",
        ),
        *(f"data.val={shapes}/val-*.tar", "trainer=ddp", "trainer.devices=2", "callbacks.checkpoint.every_n_steps=1"),
        *("callbacks.bad_updates.action=return", POISON, "+callbacks.poison.step=3", "+callbacks.poison.rank=1"),
        # The newest checkpoint when update 4 is bad is that of update 2.
        *("+callbacks.full._target_=full_disk.FullDisk", "+callbacks.full.step=3", "~callbacks.pictures"),
    ]
    done = call(tmp_path, *options, f"run_dir={tmp_path}/dvae")
    assert done.returncode == 0, done.stderr
    assert "last.ckpt' could not be written: the disk is full" in done.stdout
    assert "update 4 is bad: its loss is nan" in done.stdout
    assert "; going back to update 2; its samples: on device 0 " in done.stdout
    (line,) = log_of(tmp_path)
    assert [len(keys) for keys in line["keys"]] == [4, 4]
    assert len({key for keys in line["keys"] for key in keys}) == 8
    content = read_checkpoint(last(tmp_path, "dvae"))
    (loader,) = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (content["global_step"], loader["samples_handed_out"]) == (4, 8 * 6)
    assert json.loads((tmp_path / "dvae" / "summary.json").read_text())["bad_updates"] == 1


def test_watch_waits_for_its_window_and_knows_losses_of_any_sign() -> None:
    for offset in (0.0, -3.0, 1e6):
        watch = LossWatch(window=4, threshold=10.0)
        for loss in (1.0, -1.0, 1.0, -1.0):
            assert watch.objection(offset + 1e9) is None
            watch.add(offset + loss)
        # Mean `offset`, deviation 1.
        assert watch.objection(offset + 9.9) is None
        assert watch.objection(offset - 100) is None
        assert "more than 10 deviations above" in str(watch.objection(offset + 10.1))


def test_watch_takes_no_steady_change_and_no_rounding_for_an_explosion() -> None:
    rising, constant = LossWatch(window=50, threshold=1.8), LossWatch(window=50, threshold=20.0)
    for number in range(200):
        for watch, loss in ((rising, 0.1 * number), (constant, 2.0 + 1e-7 * (number % 2))):
            assert watch.objection(loss) is None
            watch.add(loss)
    assert constant.objection(2.1) is not None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_bad_from_the_first_update(loss: float) -> None:
    assert LossWatch(window=9, threshold=None).objection(loss) == f"its loss is {loss}"


def test_line_that_a_crash_cut_off_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "bad_updates.jsonl").write_text('{"update": 1}\n{"upd')
    BadUpdates(str(tmp_path))._record(update=2)
    lines = (tmp_path / "bad_updates.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"update": 1}', '{"upd']
    assert json.loads(lines[2])["update"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "ignore"}, r"bad_updates\.action must be one of skip, return, stop, got 'ignore'"),
        ({"max_bad_updates": -1}, r"bad_updates\.max_bad_updates must be >= 0, got -1"),
        ({"loss_window": 1}, r"bad_updates\.loss_window must be >= 2, got 1"),
        ({"loss_threshold": 0}, r"bad_updates\.loss_threshold must be a finite number > 0 or null, got 0"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BadUpdates("run", **options)


def test_run_that_ends_before_its_first_checkpoint_keeps_what_it_has_found(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint has it: see its samples in '.*bad_updates.jsonl'"):
        train(tmp_path, "dvae", "callbacks.bad_updates.action=stop", POISON, "+callbacks.poison.step=1")
    (line,) = log_of(tmp_path)
    assert line["update"] == 2
    assert read_status(tmp_path / "dvae" / "status.json").state == "failed"
