"""The average of the weights: its arithmetic, when it is in place, and what checkpoints hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalle1.training.ema import EMA


def module_and_trainer(value: float) -> tuple[Any, Any]:
    """A module whose network has one weight, and a trainer that counts steps."""
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(value)
    module = SimpleNamespace(model=network, device=torch.device("cpu"), fresh_weights=set())
    return module, SimpleNamespace(global_step=0)


def started(decay: float, value: float, interval: int = 1) -> tuple[EMA, Any, Any]:
    """An average at the start of a training from `value`, with its module and trainer."""
    module, trainer = module_and_trainer(value)
    ema = EMA(decay=decay, interval=interval)
    ema.on_fit_start(trainer, module)
    return ema, trainer, module


def step(ema: EMA, trainer: Any, module: Any, value: float) -> None:
    module.model.weight.data.fill_(value)
    trainer.global_step += 1
    ema.on_train_batch_end(trainer, module, None, None, 0)


def test_average_starts_over_with_weights_that_were_set_anew() -> None:
    ema, trainer, module = started(decay=0.999, value=1.0)
    for _ in range(50):
        step(ema, trainer, module, 1.0)
    module.fresh_weights = {"weight"}
    step(ema, trainer, module, 7.0)
    checkpoint: dict[str, Any] = {}
    ema.on_save_checkpoint(trainer, module, checkpoint)
    assert checkpoint["ema"]["weight"].item() == 7
    assert module.fresh_weights == set()


def test_average_follows_its_closed_form() -> None:
    ema, trainer, module = started(decay=0.9, value=1.0)
    expected = 1.0
    for number in range(1, 200):
        step(ema, trainer, module, float(number))
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * number
    ema.on_validation_start(trainer, module)
    assert module.model.weight.item() == pytest.approx(expected, rel=1e-5)


def average_of(ema: EMA, trainer: Any, module: Any) -> float:
    checkpoint: dict[str, Any] = {"state_dict": {}}
    ema.on_save_checkpoint(trainer, module, checkpoint)
    return float(checkpoint["ema"]["weight"])


def test_average_of_every_third_update_follows_its_closed_form() -> None:
    ema, trainer, module = started(decay=0.9, value=1.0, interval=3)
    expected = 1.0
    for number in range(1, 200):
        step(ema, trainer, module, float(number))
        if number % 3 == 0:
            decay = min(0.9, (1 + number // 3) / (10 + number // 3))  # the ramp counts copies
            expected = decay * expected + (1 - decay) * number
        assert average_of(ema, trainer, module) == pytest.approx(expected, rel=1e-5)


def test_average_with_an_interval_resumes_between_two_copies() -> None:
    whole, trainer, module = started(decay=0.9, value=1.0, interval=3)
    for number in range(1, 5):
        step(whole, trainer, module, float(number))
    checkpoint: dict[str, Any] = {"state_dict": {}}
    whole.on_save_checkpoint(trainer, module, checkpoint)
    resumed = EMA(decay=0.9, interval=3)
    resumed.on_load_checkpoint(trainer, module, checkpoint)
    resumed.on_fit_start(trainer, module)
    for number in range(5, 8):
        step(whole, trainer, module, float(number))
        resumed.on_train_batch_end(trainer, module, None, None, 0)
    assert average_of(resumed, trainer, module) == average_of(whole, trainer, module)


def test_weights_set_anew_enter_the_average_at_once_whatever_its_interval() -> None:
    ema, trainer, module = started(decay=0.999, value=1.0, interval=25)
    module.fresh_weights = {"weight"}
    step(ema, trainer, module, 7.0)
    assert average_of(ema, trainer, module) == 7
    step(ema, trainer, module, 9.0)
    assert average_of(ema, trainer, module) == 7, "not yet time for a copy"


def test_batches_that_only_accumulate_do_not_move_it() -> None:
    ema, trainer, module = started(decay=0.5, value=1.0)
    step(ema, trainer, module, 2.0)
    ema.on_validation_start(trainer, module)
    average = module.model.weight.item()
    ema.on_validation_end(trainer, module)
    ema.on_train_batch_end(trainer, module, None, None, 1)
    ema.on_validation_start(trainer, module)
    assert module.model.weight.item() == average


@pytest.mark.parametrize("interrupted", [False, True])
def test_trained_weights_are_back_after_validation(interrupted: bool) -> None:
    ema, trainer, module = started(decay=0.9, value=0.0)
    step(ema, trainer, module, 8.0)
    ema.on_validation_start(trainer, module)
    assert module.model.weight.item() != 8.0
    if interrupted:
        ema.on_exception(trainer, module, KeyboardInterrupt())
    else:
        ema.on_validation_end(trainer, module)
    assert module.model.weight.item() == 8.0


def test_checkpoint_of_a_validation_holds_the_trained_weights_and_the_average() -> None:
    ema, trainer, module = started(decay=0.9, value=0.0)
    step(ema, trainer, module, 11.0)
    ema.on_validation_start(trainer, module)
    checkpoint: dict[str, Any] = {"state_dict": {"model.weight": module.model.weight.detach().clone()}}
    ema.on_save_checkpoint(trainer, module, checkpoint)
    assert checkpoint["state_dict"]["model.weight"].item() == 11.0
    assert checkpoint["ema"]["weight"].item() == pytest.approx(11 * (1 - 2 / 11))

    again = EMA(decay=0.9)
    again.on_load_checkpoint(trainer, module, checkpoint)
    again.on_fit_start(trainer, module)
    again.on_validation_start(trainer, module)
    assert module.model.weight.item() == pytest.approx(9.0)


def test_decay_0_keeps_no_average() -> None:
    ema, trainer, module = started(decay=0.0, value=1.0)
    step(ema, trainer, module, 2.0)
    ema.on_validation_start(trainer, module)
    assert module.model.weight.item() == 2.0
    checkpoint: dict[str, Any] = {"state_dict": {}}
    ema.on_save_checkpoint(trainer, module, checkpoint)
    assert checkpoint["ema"] == {}
