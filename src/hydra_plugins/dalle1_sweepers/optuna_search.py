"""`hydra/sweeper=dalle1_optuna`: runs whose options Optuna chooses by what earlier ones have come to.

`-m hydra/sweeper=dalle1_optuna stage=dvae 'optim.lr=tag(log,interval(1e-4,1e-2))' hydra.sweeper.n_trials=20`. The
plugin that Hydra 1.3 has for Optuna needs Optuna 2.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.dalle1_sweepers.launched_jobs import LaunchedJobs, fixed_option

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from dalle1.training.sweep_record import Job

logger = logging.getLogger(__name__)
STUDY, BEST = "study.journal", "best.yaml"
_NAME = "dalle1"
_IDENTITY = "search"  # attribute of the study: what must stay the same when a search goes on
# A trial in which the whole sweep died so often may be what it dies of.
_MAX_INTERRUPTIONS = 3


class OptunaSweeper(Sweeper):
    """A search that goes on where it was interrupted; trial n is the run in the sweep's directory n."""

    def __init__(self, metric: str | None, direction: str, n_trials: int, n_jobs: int, sampler: str, seed: int) -> None:
        """As `OptunaSweeperConf`. Raises: HydraException for values that it does not have, or without Optuna."""
        if find_spec("optuna") is None:
            raise HydraException(
                "hydra/sweeper=dalle1_optuna needs optuna, which is not installed; pip install '.[sweep]'"
            )
        for name, value, choices in (
            ("direction", direction, ("minimize", "maximize")),
            ("sampler", sampler, ("tpe", "random")),
        ):
            if value not in choices:
                raise HydraException(f"hydra.sweeper.{name} must be {' or '.join(choices)}, got {value}")
        for name, number in (("n_trials", n_trials), ("n_jobs", n_jobs)):
            if number < 1:
                raise HydraException(f"hydra.sweeper.{name} must be >= 1, got {number}")
        self._metric, self._direction, self._sampler, self._seed = metric, direction, sampler, seed
        self._n_trials, self._n_jobs = n_trials, n_jobs
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra gives a sweeper."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Make trials until there are as many as were asked for; write the best one's options into `best.yaml`.

        Raises: HydraException if there is nothing to search; ValueError if the study in the directory is of another
            search, or the runs' summaries lack the metric; ChildProcessError if all trials have failed; as
            `LaunchedJobs`.
        """
        assert self.config is not None, "Hydra calls setup first"
        assert self.hydra_context is not None, "as above"
        fixed, space = parse_space(
            OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(arguments)
        )
        with LaunchedJobs(self.config, self.hydra_context, self.task_function) as jobs:
            study = self._open_study(jobs, arguments)
            while trials := self._next_trials(study, jobs, space):
                overrides = {
                    trial.number: [*fixed, *(f"{name}={_text(trial.params[name])}" for name in space)]
                    for trial in trials
                }
                self.validate_batch_is_legal(list(overrides.values()))
                for number, job in jobs.run(overrides).items():
                    self._tell(study, jobs, number, job)
                write_best(study, jobs)
            return self._end(study, jobs)

    def _open_study(self, jobs: LaunchedJobs, arguments: Sequence[str]) -> optuna.Study:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(jobs.directory / STUDY)))
        create = partial(
            optuna.create_study,
            storage=storage,
            study_name=_NAME,
            direction=optuna.study.StudyDirection[self._direction.upper()],
            load_if_exists=True,
        )
        study = create()
        has_finished = any(trial.state.is_finished() for trial in study.trials)
        if not has_finished and not jobs.known:  # Hydra has refused the options before anything was launched
            optuna.delete_study(study_name=_NAME, storage=storage)
            study = create()
        identity = {"options": sorted(arguments), "metric": self._metric, "direction": self._direction}
        before = study.user_attrs.get(_IDENTITY, identity)
        changed = [name for name in identity if before[name] != identity[name]]
        # That runs do not have a metric is seen when the first one has ended.
        if changed and (has_finished or changed != ["metric"]):
            raise ValueError(
                f"a search must go on with the {' and '.join(changed)} that it began with, {before[changed[0]]}, got "
                f"{identity[changed[0]]}; choose another hydra.sweep.dir="
            )
        lost = [trial.number for trial in study.trials if trial.value is not None and trial.number not in jobs.known]
        if lost:
            raise ValueError(
                f"the sweep's record must have all trials of its study, sweep.json in '{jobs.directory}' lacks "
                f"{lost[0]}; put it back, or search in another hydra.sweep.dir"
            )
        study.set_user_attr(_IDENTITY, identity)
        return study

    def _next_trials(
        self, study: optuna.Study, jobs: LaunchedJobs, space: dict[str, BaseDistribution]
    ) -> list[FrozenTrial]:
        """Those to run now: first those that an earlier start has left, then new ones."""
        left = []
        for trial in _running(study):
            job = jobs.known.get(trial.number)
            if job is not None and job.interruptions >= _MAX_INTERRUPTIONS and job.status == "stopped":
                error = f"was interrupted {job.interruptions} times without a word"
                jobs.note_failed(trial.number, error)
                self._fail(study, trial.number, error)
            elif job is not None and (job.status == "failed" or jobs.is_done(trial.number)):
                self._tell(study, jobs, trial.number, job)  # before the sweep itself could
            else:
                left.append(trial)
        n_trials = len(study.trials)
        n_new = max(min(self._n_jobs - len(left), self._n_trials - n_trials), 0)
        for number in range(n_trials, n_trials + n_new):
            # A sampler of its own for each trial, so that a search that was interrupted chooses what it would have.
            study.sampler = self._make_sampler(number)
            study.ask(fixed_distributions=space)
        new = [trial for trial in _running(study) if trial.number >= n_trials]
        return [*left, *new][: self._n_jobs]

    def _make_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        import optuna

        seed = (self._seed * 1_000_000 + number) % 2**32
        if self._sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        # The liar: trials that are chosen together are not to be the same.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=self._n_jobs > 1)

    def _tell(self, study: optuna.Study, jobs: LaunchedJobs, number: int, job: Job) -> None:
        """Tell Optuna how a trial has ended; one that was stopped goes on later."""
        from dalle1.training.sweep_record import metric_of

        if job.status == "failed":
            self._fail(study, number, job.error or "")
        elif job.status == "finished":
            path = jobs.directory / str(number) / "summary.json"
            summary = json.loads(path.read_text(encoding="utf-8"))
            name = self._metric or job.metric
            value = metric_of(summary, name)
            if value is None:
                numbers = [each for each in summary if metric_of(summary, each) is not None]
                raise ValueError(
                    f"hydra.sweeper.metric must be a number of '{path}', one of {', '.join(numbers)}, got {name}"
                )
            study.tell(number, value)
            logger.info("trial %d of %d: %s %.6g", number, self._n_trials, name, value)

    def _fail(self, study: optuna.Study, number: int, error: str) -> None:
        from optuna.trial import TrialState

        study.tell(number, state=TrialState.FAIL)
        logger.info("trial %d of %d has failed: %s", number, self._n_trials, error)

    def _end(self, study: optuna.Study, jobs: LaunchedJobs) -> float:
        n_failed = sum(trial.value is None for trial in study.trials)
        write_best(study, jobs)
        if n_failed == len(study.trials):
            raise ChildProcessError(
                f"some trial of a search must end well, all {n_failed} have failed; "
                f"'{jobs.directory}/sweep.json' says why"
            )
        best = study.best_trial
        logger.info(
            "best of %d trials (%d failed): %d with %.6g, see '%s'",
            len(study.trials), n_failed, best.number, best.value, jobs.directory / BEST,
        )  # fmt: skip
        assert best.value is not None, "it has ended well"
        return best.value


def parse_space(overrides: Sequence[Override]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """Options that all trials have, and what Optuna may choose for the others, by their names.

    `choice(...)` and commas are categories; `interval(a,b)` real numbers, `int(interval(a,b))` whole ones;
    `range(a,b,step)` numbers at that distance, without b; `tag(log,...)` makes intervals logarithmic.

    Raises: HydraException if nothing is to be chosen, or for a range that is none.
    """
    from optuna.distributions import CategoricalDistribution

    fixed: list[str] = []
    space: dict[str, BaseDistribution] = {}
    for override in overrides:
        name = override.get_key_element()
        value = override.value()
        if not override.is_sweep_override():
            fixed.append(fixed_option(override))
        elif isinstance(value, IntervalSweep | RangeSweep):
            space[name] = _numbers(name, value)
        else:
            # As they are written, so that Hydra reads them again as it would have.
            space[name] = CategoricalDistribution(list(override.sweep_string_iterator()))
    if not space:
        raise HydraException(
            "a search must have options to choose, as 'optim.lr=tag(log,interval(1e-4,1e-2))' or 'optim.lr=1,2', "
            "got none"
        )
    return fixed, space


def _numbers(name: str, sweep: IntervalSweep | RangeSweep) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    is_log = "log" in sweep.tags
    low, high = (sweep.start, sweep.end) if isinstance(sweep, IntervalSweep) else (sweep.start, sweep.stop)
    assert low is not None, "the grammar has both"
    assert high is not None, "the grammar has both"
    try:
        if isinstance(sweep, IntervalSweep):
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=is_log)
            return FloatDistribution(low, high, log=is_log)
        values = list(sweep.range())
        if all(isinstance(each, int) for each in values):
            return IntDistribution(int(values[0]), int(values[-1]), step=int(sweep.step), log=is_log)
        return FloatDistribution(float(values[0]), float(values[-1]), step=float(sweep.step), log=is_log)
    except (ValueError, IndexError) as error:
        raise HydraException(f"{name} must be an interval or a range that can be searched: {error}") from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _running(study: optuna.Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))


def write_best(study: optuna.Study, jobs: LaunchedJobs) -> None:
    """Write the best trial's number, value and options, if any has ended well."""
    from dalle1.atomic_files import atomic

    if all(trial.value is None for trial in study.trials):
        return
    best = study.best_trial
    content = {
        "trial": best.number,
        "metric": jobs.known[best.number].metric,
        "value": best.value,
        "options": {name: best.params[name] for name in best.params},
        "command": jobs.command(jobs.known[best.number].overrides),
    }
    with atomic(jobs.directory / BEST) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
