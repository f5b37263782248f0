"""Seconds of one CPU core that evaluations take once features are there: `make bench-evaluation`.

Distances of two sets of pictures with 2048 random features each, as Inception's, and the nearest of 100,000 with 512.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Rows, machine, print_tables, write_report

from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.evaluation.chunks import CHUNK_SIZE
from dalle1.evaluation.distances import NEAREST, frechet_distance, kernel_distance, kid_subset_size, precision_recall
from dalle1.evaluation.nearest import nearest


def measure(pictures: int) -> Rows:
    """Seconds of each distance, and of the search."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    a, b, val = (torch.randn(pictures, n_features, generator=generator) for n_features in (2048, 2048, 512))
    train = torch.split(torch.randn(100_000, 512, generator=generator), CHUNK_SIZE)
    work: dict[str, Callable[[], object]] = {
        "fid": lambda: frechet_distance(a, b),
        "kid": lambda: kernel_distance(a, b, subset_size=kid_subset_size(pictures, pictures)),
        "precision_recall": lambda: precision_recall(a, b),
        "overlap": lambda: nearest(val, train),
    }
    rows: Rows = []
    for name, step in work.items():
        started = time.process_time()
        step()
        rows.append({"what": name, "seconds": round(time.process_time() - started, 1)})
    return rows


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=5000, help="of each side (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/evaluation.json"), help="(default: %(default)s)")
    options = parser.parse_args()
    require_int("--pictures", options.pictures, at_least=NEAREST + 1)
    rows = measure(options.pictures)
    write_report(options.out, rows, {})
    print(machine())
    print_tables(options.out, rows)


if __name__ == "__main__":
    main()
