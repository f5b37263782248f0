"""Runs side by side: `python -m dalle1.compare RUNS... [metric=val/loss] [out=page.html]`.

RUNS are directories of runs, directories with runs somewhere below them, and globs, as 'runs/sweeps/lr/*'. Runs of each
stage make a table: how far each is, the metric by which it is chosen (last and best value), time, speed, weights, and
the options in which they differ. `out` may end in .html (a page with the curves of all runs), .json or .csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dalle1.atomic_files import atomic, write_json
from dalle1.cli import OptionError, dashed_options, errors_in_one_line
from dalle1.comparison_page import render_comparison
from dalle1.html_page import for_json
from dalle1.run_records import RunRecord, differing_options, find_runs, option_text, read_run

# Sorting by these names; all others are options.
SORTABLE = ("best", "last", "run", "wall_seconds", "pictures_per_second", "n_weights")
_ENDINGS = (".html", ".json", ".csv")
_TRAIN_LOSS = "train/loss"
_LONGEST_CELL = 40  # characters of an option's value in the printed table
_WIDTH_OF_FILES = 200  # characters of the printed table where there is no terminal


def compare(runs: Sequence[RunRecord], *, metrics: Sequence[str] = (), sort: str = "best") -> dict[str, Any]:
    """All that a comparison shows, in plain types; runs are grouped by stage.

    Args:
        runs: At least one.
        metrics: Names of logged quantities; the first one that a stage has is the one that it is sorted by. Without,
            that by which each stage chooses its best checkpoint, and the training loss.
        sort: `best` or `last` value of that metric, `run`, `wall_seconds`, `pictures_per_second`, `n_weights`, or the
            name of an option. Runs without a value come last.

    Raises: ValueError if no run has one of the metrics, or if no option has the name in `sort`.
    """
    names = {name for run in runs for name in run.curves}
    for metric in metrics:
        if metric not in names:
            known = ", ".join(sorted(names)) or "none"
            raise ValueError(f"metric must be one that a run has logged, got {metric!r}; there are {known}")
    if sort not in SORTABLE and not any(sort in run.options for run in runs):
        raise ValueError(f"sort must be one of {', '.join(SORTABLE)} or an option of a run, got {sort!r}")
    parent = _common_parent([run.directory for run in runs])
    stages = []
    for stage in dict.fromkeys(run.stage for run in runs):
        members = [run for run in runs if run.stage == stage]
        wanted = metrics or [*dict.fromkeys(run.monitor for run in members), _TRAIN_LOSS]
        shown = [name for name in wanted if any(name in run.curves for run in members)]
        rows = [_row(run, shown, parent) for run in members]
        rows.sort(key=lambda row: _sort_key(row, shown, sort))
        stages.append({"stage": stage, "metrics": shown, "options": differing_options(members), "runs": rows})
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "directory": parent, "stages": stages}


def _common_parent(directories: Sequence[str]) -> str:
    """The directory that all runs are below; empty if there is none but the working directory or the root."""
    parents = [os.path.dirname(os.path.abspath(directory)) for directory in directories]
    parent = os.path.relpath(os.path.commonpath(parents))
    return "" if parent == "." or os.path.dirname(os.path.abspath(parent)) == os.path.abspath(parent) else parent


def _row(run: RunRecord, metrics: Sequence[str], parent: str) -> dict[str, Any]:
    bests = {metric: run.best(metric) for metric in metrics}
    return {
        "run": os.path.relpath(run.directory, parent or "."),
        "directory": run.directory,
        "state": run.state,
        "step": run.step,
        "max_steps": run.max_steps,
        "metrics": {
            metric: {
                "last": run.final(metric),
                "best": best[0] if best else None,
                "best_step": best[1] if best else None,
                "more_is_better": run.more_is_better(metric),
            }
            for metric, best in bests.items()
        },
        "wall_seconds": run.wall_seconds,
        "pictures_per_second": run.pictures_per_second,
        "n_weights": run.n_weights,
        "options": dict(run.options),
        "error": run.error,
        "problems": list(run.problems),
    }


def _sort_key(row: Mapping[str, Any], metrics: Sequence[str], sort: str) -> tuple[Any, ...]:
    if sort in ("best", "last"):
        cell = row["metrics"][metrics[0]] if metrics else {"best": None, "last": None, "more_is_better": False}
        value = cell[sort]
        if value is not None and cell["more_is_better"]:
            value = -value
    else:
        value = 0 if sort == "run" else row[sort] if sort in SORTABLE else row["options"].get(sort)
    is_number = isinstance(value, int | float)
    # Where they are equal, by name, with numbers in it by their size.
    name = [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", row["run"])]
    return (value is None, not is_number, value if is_number else 0, "" if is_number else str(value), name)


def format_comparison(comparison: Mapping[str, Any], *, width: int) -> str:
    """The tables that the command prints, one for each stage, and what went wrong with runs.

    Of options as many as `width` characters hold; a line below says how many more differ.
    """
    parts = []
    if comparison["directory"]:
        parts.append(f"runs in {comparison['directory']}")
    for group in comparison["stages"]:
        metric = group["metrics"][0] if group["metrics"] else None
        shown = len(group["options"])
        while _width(table := _table(group, metric, group["options"][:shown])) > width and shown:
            shown -= 1
        parts.append(f"{group['stage']}\n{table}")
        if more := len(group["options"]) - shown:
            parts.append(f"options that differ and have no room here: {more}; out=page.html has them all")
        lines = [f"{row['run']}: {line}" for row in group["runs"] for line in [row["error"], *row["problems"]] if line]
        parts += ["\n".join(lines)] if lines else []
    return "\n\n".join(parts)


def _table(group: Mapping[str, Any], metric: str | None, options: Sequence[str]) -> str:
    headers = ["run", "state", "update"]
    headers += [metric, "best", "at"] if metric else []
    headers += ["time", "pictures/s", "weights", *options]
    return tabulate([_cells(row, metric, options) for row in group["runs"]], headers, disable_numparse=True)


def _width(table: str) -> int:
    return max(map(len, table.splitlines()))


def _cells(row: Mapping[str, Any], metric: str | None, options: Sequence[str]) -> list[str]:
    step, max_steps = row["step"], row["max_steps"]
    update = "" if step is None else f"{step:,}"
    cells = [row["run"], row["state"], f"{update} of {max_steps:,}" if max_steps and step != max_steps else update]
    if metric:
        values = row["metrics"][metric]
        at = values["best_step"]
        cells += [_number(values["last"]), _number(values["best"]), "" if at is None else f"{at:,}"]
    rate, n_weights = row["pictures_per_second"], row["n_weights"]
    cells += [format_seconds(row["wall_seconds"]), "" if rate is None else f"{rate:,.3g}"]
    cells.append("" if n_weights is None else f"{n_weights:,}")
    return cells + [format_option(row["options"].get(name, "")) for name in options]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def format_option(value: Any) -> str:
    """An option's value as the command line takes it, cut if it is long."""
    text = option_text(value)
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 3]}..."


def format_seconds(seconds: float | None) -> str:
    """A time as 1:02:03, or 4.5 s below a minute; empty for none."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def write_csv(path: Path, comparison: Mapping[str, Any]) -> None:
    """Write a row for each run: numbers in full, with every metric and every option that differs in some stage."""
    stages = comparison["stages"]
    metrics = list(dict.fromkeys(name for group in stages for name in group["metrics"]))
    options = list(dict.fromkeys(name for group in stages for name in group["options"]))
    plain = ["directory", "state", "step", "max_steps", "wall_seconds", "pictures_per_second", "n_weights", "error"]
    values = ["last", "best", "best_step"]
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", *plain, *(f"{name} {value}" for name in metrics for value in values), *options])
        for group in stages:
            for row in group["runs"]:
                numbers = [row["metrics"].get(name, {}).get(value) for name in metrics for value in values]
                told = [row["options"].get(name) for name in options]
                writer.writerow([group["stage"], *(row[name] for name in plain), *numbers, *told])


@errors_in_one_line()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dalle1.compare",
        description=__doc__,
        epilog="Options may also be written without dashes: out=page.html.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs, directories with runs, globs")
    parser.add_argument("--metric", action="append", default=[], help="what to compare; may be given several times")
    parser.add_argument("--sort", default="best", help=f"{', '.join(SORTABLE)} or an option (default: %(default)s)")
    parser.add_argument("--out", action="append", default=[], help=".html, .json or .csv; may be given several times")
    options = parser.parse_intermixed_args(dashed_options(sys.argv[1:], ("metric", "sort", "out")))
    for out in options.out:
        if not out.endswith(_ENDINGS):
            raise OptionError(f"out must end in {', '.join(_ENDINGS)}, got {out!r}")
    now = time.time()
    directories, without = find_runs(options.runs)
    runs = [read_run(directory, now=now) for directory in directories]
    comparison = for_json(compare(runs, metrics=options.metric, sort=options.sort))
    print(format_comparison(comparison, width=shutil.get_terminal_size((_WIDTH_OF_FILES, 0)).columns))
    if without:
        print(f"\nno run at or below {', '.join(without)}")
    for out in options.out:
        if out.endswith(".html"):
            page = render_comparison(comparison, {run.directory: run.curves for run in runs})
            with atomic(out) as temporary:
                temporary.write_text(page, encoding="utf-8")
        elif out.endswith(".json"):
            write_json(out, comparison)
        else:
            write_csv(Path(out), comparison)
        print(f"written: {out}")


if __name__ == "__main__":
    main()
