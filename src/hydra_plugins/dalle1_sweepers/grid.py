"""`hydra/sweeper=dalle1_grid`, the default of train.py: a run for each combination of options."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.dalle1_sweepers.launched_jobs import LaunchedJobs, fixed_option

logger = logging.getLogger(__name__)


class GridSweeper(Sweeper):
    """All combinations of options; started again in the same directory it makes those that are missing."""

    def __init__(self, metric: str | None) -> None:
        """`metric` is for the jobs, which read the configuration."""
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra gives a sweeper."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Make the runs that `arguments` ask for, and that an earlier start has not made.

        Raises: HydraException for an interval; ChildProcessError if some of them fail, after all others are done; as
            `LaunchedJobs`.
        """
        assert self.config is not None, "Hydra calls setup first"
        assert self.hydra_context is not None, "as above"
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        combinations = combine(parser.parse_overrides(arguments))
        self.validate_batch_is_legal(combinations)
        with LaunchedJobs(self.config, self.hydra_context, self.task_function) as jobs:
            numbers = number_combinations({number: job.overrides for number, job in jobs.known.items()}, combinations)
            missing = {number: options for number, options in numbers.items() if not jobs.is_done(number)}
            ended = jobs.run(missing) if missing else {}
        failed = [str(number) for number, job in ended.items() if job.status == "failed"]
        if failed:
            raise ChildProcessError(
                f"all jobs of a sweep must end well, {len(failed)} of {len(numbers)} have not: "
                f"{', '.join(failed)} in '{jobs.directory}', whose sweep.json says why; "
                f"the same command with hydra.sweep.dir={jobs.directory} tries them again"
            )
        for number, job in sorted(ended.items()):
            if job.value is not None:
                logger.info("job %d: %s %.6g, %s", number, job.metric, job.value, " ".join(job.overrides))
        logger.info("side by side: python -m dalle1.compare '%s/*'", jobs.directory)
        return list(ended.values())


def combine(overrides: Sequence[Override]) -> list[list[str]]:
    """All combinations of the values that options have; of an option that is given twice the last time counts.

    Raises: HydraException for an interval, which has no end of values.
    """
    choices: dict[str, list[str]] = {}
    for override in overrides:
        name = override.get_key_element()
        if not override.is_sweep_override():
            choices[name] = [fixed_option(override)]
        elif override.is_discrete_sweep():
            choices[name] = [f"{name}={value}" for value in override.sweep_string_iterator()]
        else:
            raise HydraException(
                f"{name} must have single values, got an interval; give some, or use hydra/sweeper=dalle1_optuna"
            )
    return [list(options) for options in product(*choices.values())]


def number_combinations(known: dict[int, list[str]], combinations: Sequence[Sequence[str]]) -> dict[int, Sequence[str]]:
    """A number for each combination of options: the one that it had before, if it is `known`, else the next one.

    In which order options are given makes no difference.
    """
    before = {tuple(sorted(options)): number for number, options in known.items()}
    numbers: dict[int, Sequence[str]] = {}
    free = max(known, default=-1) + 1
    for options in combinations:
        number = before.get(tuple(sorted(options)))
        if number is None:
            number, free = free, free + 1
        numbers[number] = options
    return numbers
