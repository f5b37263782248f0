"""How often the transformers of some runs draw what a caption says: what a sweep on the generated scenes is judged by.

    python benchmarks/sweep_accuracy.py 'runs/sweeps/text_weight/*'

Losses cannot tell: those of two dVAEs' tokens are of different things, and a lower one need not be a better picture.
Each run samples pictures of the same held-out prompts with the same random numbers, through the dVAE that it was
trained with; the shapes scorer judges them, single ones and the best by the demo's CLIP.
"""

from __future__ import annotations

import argparse
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Rows, print_tables, write_report
from omegaconf import OmegaConf
from tqdm import tqdm

from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.evaluation.pictures import to_uint8
from dalle1.evaluation.report import held_out_prompts
from dalle1.evaluation.sampling_curves import Point
from dalle1.evaluation.shapes_scorer import score
from dalle1.pipeline import Pipeline
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.sampling.filters import SamplingConfig

_CHECKPOINT = Path("checkpoints") / "last.ckpt"
_TEMPERATURE = 0.7  # as the demo's report


@torch.no_grad()
def measure(run_dir: Path, prompts: Sequence[str], *, clip: Path, candidates: int, seed: int) -> dict[str, Any]:
    """The accuracies of one run, and its losses.

    Raises: FileNotFoundError if the run has not ended, or its dVAE or the CLIP is not there.
    """
    summary = run_dir / "summary.json"
    if not summary.is_file():
        raise FileNotFoundError(f"a run must have ended to be judged, there is no '{summary}'; train it to its end")
    pipeline = Pipeline.from_checkpoint(
        transformer=run_dir / _CHECKPOINT,
        dvae=OmegaConf.load(run_dir / "config.yaml").dvae,
        reranker=CLIPReranker.load(clip),
    )
    results = pipeline(
        prompts,
        candidates=candidates,
        seed=seed,
        sampling=SamplingConfig(temperature=_TEMPERATURE, guidance_scale=pipeline.default_guidance_scale),
        batch_size=256,
    )
    right = [[score(picture, result.prompt).right for picture in to_uint8(result.images)] for result in results]
    single = Point.of([sum(of_prompt) / candidates for of_prompt in right])
    best = Point.of([float(of_prompt[0]) for of_prompt in right])
    losses = json.loads(summary.read_text(encoding="utf-8"))
    return {
        "run": str(run_dir),
        "single": single.accuracy,
        "standard_error": single.standard_error,
        f"best_of_{candidates}": best.accuracy,
        "its_standard_error": best.standard_error,
        "image_nats_per_token": losses["image_nats_per_token"],
        "text_nats_per_token": losses["text_nats_per_token"],
        "train_seconds": losses["wall_seconds"],
    }


@errors_in_one_line()
def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of runs of stage=transformer, or globs of these")
    parser.add_argument("--clip", type=Path, default=Path("runs/shapes/clip") / _CHECKPOINT, help="what chooses")
    parser.add_argument("--shards", default="data/shapes/test-*.tar", help="captions to use as prompts")
    parser.add_argument("--prompts", type=int, default=200, help="how many of them")
    parser.add_argument("--candidates", type=int, default=8, help="samples per prompt")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/sweep_accuracy.json"))
    options = parser.parse_args()
    require_int("--candidates", options.candidates, at_least=1)
    runs = sorted({Path(path) for pattern in options.runs for path in glob.glob(pattern) if Path(path).is_dir()})
    if not runs:
        raise FileNotFoundError(f"runs must be directories, there are none for {' '.join(options.runs)}")
    prompts = held_out_prompts(options.shards, options.prompts)
    rows: Rows = [
        measure(run, prompts, clip=options.clip, candidates=options.candidates, seed=options.seed)
        for run in tqdm(runs, unit="run")
    ]
    write_report(options.out, rows, {}, prompts=len(prompts))
    print_tables(options.out, rows)


if __name__ == "__main__":
    main()
