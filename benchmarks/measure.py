"""What the benchmarks share: configurations, the machine, fresh processes, steps in turns, the report."""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from tabulate import tabulate
from tqdm import tqdm

from dalle1.atomic_files import write_json

ROOT = Path(__file__).resolve().parents[1]
Rows = list[dict[str, Any]]

# glibc's allocator gives every large tensor back to the system at once, and the first use of new memory is slow. With
# these it keeps what it has. Read when a process starts.
TUNED_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def configuration(*overrides: str) -> DictConfig:
    """What `train.py` makes of its options."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return hydra.compose("train", ["name=bench", *overrides])


def machine() -> str:
    """What this ran on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def train(*options: str) -> None:
    """Run `train.py`; what it says is shown if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *options], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"train.py must do {' '.join(options)}, it said: {done.stderr.strip().splitlines()[-1]}")


def peak_gigabytes() -> float:
    """Peak memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # where `ru_maxrss` would begin with the parent's peak
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def _with_peak(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    torch.set_flush_denormal(True)
    result = work(*arguments)
    return result, peak_gigabytes()


def in_own_process(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `work` returns in a fresh process, and that process's peak memory in GB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_peak, (work, *arguments))


def _serve(connection: Connection, make_step: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    torch.set_flush_denormal(True)
    step = make_step(*arguments)
    while connection.recv():
        started = time.perf_counter()
        step()
        connection.send((time.perf_counter() - started, peak_gigabytes()))


class StepProcess:
    """A process that makes one step when told to, and says how long it took and its peak memory in GB."""

    def __init__(self, connection: Connection) -> None:
        """Talk through `connection`."""
        self._connection = connection

    def step(self) -> tuple[float, float]:
        """Make a step.

        Raises: RuntimeError if the process has died.
        """
        try:
            self._connection.send(True)
            seconds, gigabytes = self._connection.recv()
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError("a measuring process has died; its error is above") from error
        return seconds, gigabytes


@contextmanager
def step_process(
    make_step: Callable[..., Callable[[], Any]], *arguments: Any, environment: Mapping[str, str]
) -> Iterator[StepProcess]:
    """A fresh process in which `make_step(*arguments)` gives the step."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make_step, arguments), daemon=True)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    there.close()
    try:
        yield StepProcess(here)
    finally:
        process.kill()
        process.join()


def time_in_turns(
    makers: Mapping[str, tuple[Callable[..., Callable[[], Any]], tuple[Any, ...]]],
    *,
    rounds: int,
    environment: Mapping[str, str],
    title: str,
) -> dict[str, tuple[float, float]]:
    """Seconds of the fastest step and peak memory in GB of every side, each in a process of its own.

    They take turns, so that noise of the machine meets all alike; the first round only warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    peaks: dict[str, float] = {}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(step_process(make, *arguments, environment=environment))
            for name, (make, arguments) in makers.items()
        }
        for number in tqdm(range(rounds + 1), desc=title, disable=None):
            for name, process in processes.items():
                took, peaks[name] = process.step()
                if number:
                    seconds[name].append(took)
    return {name: (min(values), peaks[name]) for name, values in seconds.items()}


def write_report(path: Path, rows: Rows, ratios: Mapping[str, float | None], **more: Any) -> None:
    """Write command, machine, date, rows and ratios as JSON, and what else there is."""
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
        "ratios": dict(ratios),
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)


def print_tables(path: Path, *tables: Rows) -> None:
    """Print tables and where the report is."""
    for table in tables:
        print(tabulate(table, headers="keys"), end="\n\n")
    print(f"numbers: {path}")
