"""Several processes of train.py, started as users start them: by Lightning, by torchrun, by srun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train.py"


def environment(**more: str) -> dict[str, str]:
    """What such processes see: the sources and the tests' callbacks, one thread each."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "training")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def call(cwd: Path, *arguments: str, command: Sequence[str] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    """`python train.py ...`, which starts other processes by itself."""
    return subprocess.run(
        [*command, str(SCRIPT), *arguments], cwd=cwd, env=environment(), capture_output=True, text=True
    )


def torchrun(cwd: Path, *arguments: str, n: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node=n train.py ...`."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}")
    return call(cwd, *arguments, command=launcher)


def srun(cwd: Path, *of_tasks: Sequence[str], n_nodes: int = 1) -> subprocess.CompletedProcess[str]:
    """`srun --kill-on-bad-exit=1 python train.py ...`: tasks in SLURM's environment, some as if elsewhere.

    Returns the exit code of the first one that has failed (srun ends the others, which may show as a signal), 0 if
    none has, and what all have written.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    per_node = len(of_tasks) // n_nodes
    common = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "dalle1",
        "SLURM_NTASKS": str(len(of_tasks)),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NNODES": str(n_nodes),
        "SLURM_NODELIST": "localhost",
        # Lightning would make one of the job's number, which may be in use.
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            cwd=cwd,
            env=environment(
                **common,
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank % per_node),
                SLURM_NODEID=str(rank // per_node),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate(of_tasks)
    ]
    failures: list[int] = []
    with ThreadPoolExecutor(len(tasks)) as pool:

        def end(task: subprocess.Popen[str]) -> tuple[str, str]:
            output = task.communicate()
            if task.returncode:
                failures.append(task.returncode)
                for each in tasks:
                    each.terminate()
            return output

        outputs = list(pool.map(end, tasks))
    code = next(iter(failures), 0)
    return subprocess.CompletedProcess(
        "srun", code, "".join(out for out, _ in outputs), "".join(error for _, error in outputs)
    )
