"""What the directories of training runs say: options, curves, how far each came and how well it did.

Any file may be missing or damaged: what can be read is there, and what cannot be is named in `problems`.
"""

from __future__ import annotations

import csv
import glob
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from dalle1.checkpoint import build_model
from dalle1.evaluation.pictures import read_curves
from dalle1.run_status import STATUS, RunStatus, read_status

CONFIG, SUMMARY = "config.yaml", "summary.json"
# As stage=dvae, clip and transformer have it, if a run's configuration does not say which.
_DEFAULT_MONITOR = "val/loss"
# Ends of the names of metrics of which more is better, among those that our stages log.
_MORE_IS_BETTER = ("accuracy", "psnr_db", "ssim", "codes_used_share", "code_perplexity", "samples_per_second", "mfu")
# Options that say where a run is, not what it is.
_PLACES = ("name", "run_dir", "results_dir", "resume")
# Groups that repeat options of others, as `${}` in the configuration has it.
_REPEATING = ("callbacks.", "data.", "logger.")
# What is computed with of a status; `read_status` leaves the types to who wrote it.
_STATUS_TYPES: dict[str, Any] = {
    "stage": str,
    "step": int,
    "max_steps": int,
    "host": str,
    "pid": int,
    "started": int | float,
    "updated": int | float,
    "samples_per_second": int | float | None,
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, as its directory has it."""

    directory: str  # as it was found
    stage: str  # "unknown" if no file says it
    state: str  # as `RunStatus.seen`; "unknown" if neither a status nor a summary says it
    step: int | None  # updates that are done
    max_steps: int | None
    # Of all starts for a run that is complete; else of the last one.
    wall_seconds: float | None
    pictures_per_second: float | None  # median over the run
    n_weights: int | None
    error: str | None  # of a failed run
    # Dotted names of all that its config.yaml says; its own directory is written {run_dir}.
    options: Mapping[str, Any]
    monitor: str  # metric by which its best checkpoint is chosen
    monitor_mode: str  # min or max
    summary: Mapping[str, Any]
    curves: Mapping[str, Curve] = field(repr=False)  # finite values of each quantity by the update they are of
    problems: tuple[str, ...]  # what could not be read, a sentence each

    def final(self, metric: str) -> float | None:
        """The last value of a metric, that of the final validation if the run is complete; None if it has none."""
        value = self.summary.get(metric.removeprefix("val/")) if metric.startswith("val/") else None
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        curve = self.curves.get(metric)
        return curve[-1][1] if curve else None

    def best(self, metric: str) -> tuple[float, int] | None:
        """The best value of a metric and the update it is of; None if it has none."""
        curve = self.curves.get(metric)
        if not curve:
            return None
        sign = -1 if self.more_is_better(metric) else 1
        step, value = min(curve, key=lambda point: (sign * point[1], point[0]))
        return value, step

    def more_is_better(self, metric: str) -> bool:
        """Whether it is to be large."""
        return self.monitor_mode == "max" if metric == self.monitor else metric.endswith(_MORE_IS_BETTER)


def find_runs(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """The directories of runs that patterns name, each once: runs, directories with runs somewhere below, globs.

    Returns: Them, and the patterns where there is something but no run, as a shell's own globs have them.

    Raises: FileNotFoundError for a pattern that leads nowhere; ValueError if there are no runs at all.
    """
    found: dict[str, str] = {}
    without: list[str] = []
    for pattern in patterns:
        is_path = os.path.exists(pattern)
        places = [pattern] if is_path else sorted(glob.glob(pattern, recursive=True))
        if not places:
            raise FileNotFoundError(f"there must be a run at {pattern!r}, there is nothing; correct the path")
        runs = [run for place in places if os.path.isdir(place) for run in _runs_below(place)]
        if not runs:
            without.append(pattern)
        for run in runs:
            found.setdefault(os.path.realpath(run), os.path.normpath(run))
    if not found:
        raise ValueError(
            f"there must be a run at or below {', '.join(map(repr, without))}, a directory with {STATUS}, {CONFIG} or "
            f"{SUMMARY}; there is none"
        )
    return list(found.values()), without


def _runs_below(place: str) -> Iterator[str]:
    if _is_run(place):
        yield place
        return
    for directory, names, _ in os.walk(place):
        names.sort()
        # Nothing below a run is one: its checkpoints may be many.
        runs = [name for name in names if _is_run(os.path.join(directory, name))]
        names[:] = [name for name in names if name not in runs and not name.startswith(".")]
        yield from (os.path.join(directory, name) for name in runs)


def _is_run(directory: str) -> bool:
    if any(os.path.isfile(os.path.join(directory, name)) for name in (STATUS, CONFIG)):
        return True
    path = os.path.join(directory, SUMMARY)
    # Stages that train no network write nothing else.
    return os.path.isfile(path) and "stage" in _read_summary(Path(path), [])


def read_run(directory: str, *, now: float) -> RunRecord:
    """Read a run's directory; `now` is the time by which a run that says nothing is silent, seconds since 1970."""
    path = Path(directory)
    problems: list[str] = []
    status = _read_status(path / STATUS, problems)
    config = _read_config(path / CONFIG, problems)
    summary = _read_summary(path / SUMMARY, problems)
    max_steps = status.max_steps if status else _number(_at(config, "optim", "max_steps"))
    curves = _read_curves(path, max_steps, problems)
    stage = summary.get("stage") or (status and status.stage) or _at(config, "stage", "name")
    seconds = summary.get("wall_seconds")
    if seconds is None and status:
        seconds = status.updated - status.started
    rates = [rate for _, rate in curves.get("perf/samples_per_second", ())]
    steps = [summary.get("step"), status.step if status else None]
    return RunRecord(
        directory=directory,
        stage=stage if isinstance(stage, str) else "unknown",
        state=_state(status, summary, now),
        step=next((step for step in steps if isinstance(step, int)), None),
        max_steps=int(max_steps) if max_steps is not None else None,
        wall_seconds=_number(seconds),
        pictures_per_second=statistics.median(rates) if rates else (status.samples_per_second if status else None),
        n_weights=_count_weights(stage, _at(config, "model")),
        error=status.error if status else None,
        options=_flat(config, _at(config, "run_dir")),
        monitor=str(_at(config, "callbacks", "best", "monitor") or _DEFAULT_MONITOR),
        monitor_mode=str(_at(config, "callbacks", "best", "mode") or "min"),
        summary=summary,
        curves=curves,
        problems=tuple(problems),
    )


def differing_options(runs: Sequence[RunRecord]) -> list[str]:
    """Names of the options in which runs differ, of those that have a configuration.

    Left out are those that say where a run is, and repetitions: options in `callbacks`, `data` and `logger` whose
    values are in all runs those of another option that ends in their name, as `${}` makes them: data.seed repeats
    seed, callbacks.ema.decay repeats optim.ema_decay.
    """
    known = [run.options for run in runs if run.options]
    names = list(dict.fromkeys(name for options in known for name in options))
    columns = {
        name: tuple(json.dumps(options.get(name), default=str) for options in known)
        for name in names
        if name not in _PLACES
    }
    differing = {name: column for name, column in columns.items() if len(set(column)) > 1}
    own = [(name, column) for name, column in differing.items() if not name.startswith(_REPEATING)]

    def is_repeated(name: str, column: tuple[str, ...]) -> bool:
        end = name.rpartition(".")[2]
        return name.startswith(_REPEATING) and any(other.endswith(end) and column == same for other, same in own)

    return [name for name, column in differing.items() if not is_repeated(name, column)]


def option_text(value: Any) -> str:
    """An option's value as the command line takes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _state(status: RunStatus | None, summary: Mapping[str, Any], now: float) -> str:
    if status:
        return status.seen(now)
    return "complete" if summary else "unknown"


def _read_status(path: Path, problems: list[str]) -> RunStatus | None:
    if not path.is_file():
        return None
    try:
        status = read_status(path)
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return None
    wanted = {**_STATUS_TYPES, **({"error": str} if status.error is not None else {})}
    for name, types in wanted.items():
        if not isinstance(getattr(status, name), types):
            problems.append(f"'{path}' must be a run's {STATUS}, its {name} is {getattr(status, name)!r}")
            return None
    return status


def _read_config(path: Path, problems: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_LOADER)
        json.dumps(content, default=str, skipkeys=True)  # refuses what contains itself, as references can make it
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        problems.append(f"'{path}' must be YAML without loops, it is not ({' '.join(str(error).split())[:100]})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"'{path}' must hold options, it does not")
        return {}
    return content


def _read_summary(path: Path, problems: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"'{path}' must be JSON, it is not ({error})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"'{path}' must hold a summary, it does not")
        return {}
    return content


def _read_curves(directory: Path, max_steps: float | None, problems: list[str]) -> dict[str, Curve]:
    try:
        curves = read_curves(directory)
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        problems.append(f"'{directory}/logs' must hold curves, they cannot be read ({error!r})")
        return {}
    last = math.inf if max_steps is None else max_steps
    # Lightning counts updates from 0, but the final validation is logged under their number.
    finite = {
        name: [(int(min(step + 1, last)), value) for step, value in points if math.isfinite(value)]
        for name, points in curves.items()
    }
    return {name: points for name, points in finite.items() if points}


def _at(config: Any, *names: str) -> Any:
    """A value in nested mappings; None if it is not there."""
    for name in names:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _flat(config: Mapping[str, Any], run_dir: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; the run's own directory in texts is {run_dir}."""
    options: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            options |= _flat(value, run_dir, f"{prefix}{name}.")
        elif isinstance(value, str) and isinstance(run_dir, str) and run_dir:
            options[f"{prefix}{name}"] = value.replace(run_dir, "{run_dir}")
        else:
            is_plain = isinstance(value, str | int | float | list | None)
            options[f"{prefix}{name}"] = value if is_plain else str(value)  # YAML has dates
    return options


def _count_weights(stage: Any, model: Any) -> int | None:
    """How many weights the network of a configuration has; None if it describes none of ours."""
    if stage not in ("dvae", "clip", "transformer") or not isinstance(model, Mapping):
        return None
    try:
        config = json.dumps({name: value for name, value in model.items() if name != "_target_"})
        return _count(stage, config)
    except (TypeError, ValueError, RuntimeError):
        return None


@lru_cache(maxsize=256)
def _count(kind: str, config: str) -> int:
    with torch.device("meta"):  # no memory, whatever its size
        network = build_model({"kind": kind, "model_config": json.loads(config)})
    return sum(weight.numel() for weight in network.parameters())
