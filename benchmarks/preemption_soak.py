"""An hour of preemption: a run of two processes that is ended and started again and again, and what became of it.

`make soak-training`. At random moments one of its processes gets SIGTERM, SIGUSR1 or SIGKILL, or all get SIGKILL, as
when a machine fails; then the same command starts again. At last the run is made complete, and a second one makes as
many updates without anything happening to it. Weights, average, optimizer and every logged loss must be the same bits.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil
import torch
from tqdm import tqdm

from dalle1.atomic_files import write_json
from dalle1.checkpoint import read_checkpoint, weights_sha256
from dalle1.evaluation.pictures import read_curves
from dalle1.run_status import STATUS, read_status

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    *("stage=dvae", "image_size=16", "grid_size=2", "image_vocab_size=16", "text_vocab_size=300", "text_seq_len=64"),
    *("data.recipe.image_size=16", "data.recipe.train_samples=90", "data.recipe.val_samples=5"),
    *("data.recipe.test_samples=4", "model.patch_size=8", "model.n_hid=16", "model.n_init=16"),
    *("optim.batch_size=4", "optim.warmup_steps=1", "optim.codebook_start_step=50", "optim.codebook_start_pictures=16"),
    # A rate that does not depend on the length of the run, which the soak decides.
    *("optim.lr=1e-3", "optim.final_lr=1e-3", "optim.decay_steps=0"),
    *("callbacks.checkpoint.every_n_steps=50", "trainer.val_check_interval=120", "trainer.log_every_n_steps=1"),
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
)
_LONG = 1_000_000  # updates: more than any soak makes
_LONGEST_LIFE_SECONDS = 15.0  # of a start, from where it has begun to train
_PATIENCE_SECONDS = 300.0
# Signal and who gets it, and the exit codes with which the first process may end: a second one that is killed is an
# error of the first.
_WAYS = {
    (signal.SIGTERM, "the first"): (0,),
    (signal.SIGTERM, "the second"): (0,),
    (signal.SIGUSR1, "all"): (0,),
    (signal.SIGKILL, "the first"): (-signal.SIGKILL,),
    (signal.SIGKILL, "the second"): (1,),
    (signal.SIGKILL, "all"): (-signal.SIGKILL,),
}


def main() -> None:
    """Run the soak. Raises: SystemExit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    directory = Path("runs/soak/preemption").absolute()
    shutil.rmtree(directory, ignore_errors=True)
    counts = torment(directory / "ended", minutes=arguments.minutes, draw=random.Random(arguments.seed))
    checkpoint = directory / "ended" / "checkpoints" / "last.ckpt"
    n_updates = read_checkpoint(checkpoint)["global_step"] + 100
    for run in ("ended", "whole"):
        subprocess.run(command(directory / run, n_updates), env=environment(), check=True)
    differing = compare(directory / "ended", directory / "whole")
    result = {"updates": n_updates, "ended": counts, "starts": sum(counts.values()) + 1, "differing": differing}
    write_json(directory.with_suffix(".json"), result)
    print(json.dumps(result, indent=2))
    sys.exit(bool(differing))


def environment() -> dict[str, str]:
    """One thread for each process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def command(run_dir: Path, n_updates: int) -> list[str]:
    """What starts the run, and what goes on with it."""
    return [sys.executable, str(ROOT / "train.py"), *OPTIONS, f"run_dir={run_dir}", f"optim.max_steps={n_updates}"]


def torment(run_dir: Path, *, minutes: float, draw: random.Random) -> dict[str, int]:
    """Start the run and end it, again and again; how often in which way. Raises: ValueError if that costs an update."""
    counts: collections.Counter[str] = collections.Counter()
    started, saved = time.monotonic(), 0
    run_dir.parent.mkdir(parents=True)
    with tqdm(total=round(minutes), unit=" min") as bar, (run_dir.parent / "ended.txt").open("w") as log:
        while (passed := (time.monotonic() - started) / 60) < minutes:
            way = end_once(run_dir, draw, log)
            counts[way] += 1
            last = run_dir / "checkpoints" / "last.ckpt"
            step = read_checkpoint(last)["global_step"] if last.exists() else 0
            if step < saved:
                raise ValueError(f"update {saved} was saved, but after {way} the newest one is {step}")
            saved = step
            bar.set_description(f"ended {sum(counts.values())} times, update {saved}")
            bar.update(int(passed) - bar.n)
    return dict(counts)


def end_once(run_dir: Path, draw: random.Random, log: IO[str]) -> str:
    """Start the run, end it some time after it has begun to train, and return how.

    Raises: ValueError if it does not begin, or ends otherwise than it should.
    """
    number, whom = draw.choice(list(_WAYS))
    way = f"{number.name} to {whom}"
    before = time.time()
    process = subprocess.Popen(command(run_dir, _LONG), env=environment(), stdout=log, stderr=log)
    while not has_begun(run_dir, before):
        if process.poll() is not None or time.time() - before > _PATIENCE_SECONDS:
            raise ValueError(f"the run must begin to train after it was ended, see '{log.name}'")
        time.sleep(0.1)
    time.sleep(draw.uniform(0, _LONGEST_LIFE_SECONDS))
    others = [child.pid for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    for pid in {"the first": [process.pid], "the second": others, "all": [process.pid, *others]}[whom]:
        os.kill(pid, number)
    try:
        code = process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise ValueError(f"the run must end after {way}, it goes on after {_PATIENCE_SECONDS:g} s") from None
    if code not in _WAYS[number, whom]:
        raise ValueError(
            f"the run must end with one of {_WAYS[number, whom]} after {way}, got {code}; see '{log.name}'"
        )
    return way


def has_begun(run_dir: Path, since: float) -> bool:
    """Whether a start after `since` trains."""
    path = run_dir / STATUS
    return path.exists() and path.stat().st_mtime > since and read_status(path).started > since


def compare(ended: Path, whole: Path) -> list[str]:
    """What differs between two runs."""
    mine, other = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (ended, whole))
    differing = [part for part in ("state_dict", "ema") if weights_sha256(mine[part]) != weights_sha256(other[part])]
    differing += ["callbacks"] if mine["callbacks"] != other["callbacks"] else []
    for ours, theirs in zip(mine["optimizer_states"], other["optimizer_states"], strict=True):
        for weight, state in theirs["state"].items():
            names = (name for name, tensor in state.items() if not torch.equal(ours["state"][weight][name], tensor))
            differing += [f"{name} of weight {weight}" for name in names]
    curves, expected = read_curves(ended), read_curves(whole)
    names = (name for name in expected if not name.startswith("perf/"))
    return differing + [f"the log of {name}" for name in names if curves.get(name) != expected[name]]


if __name__ == "__main__":
    main()
