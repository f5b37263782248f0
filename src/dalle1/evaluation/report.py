"""The demo's last step: `python -m dalle1.evaluation.report` samples held-out prompts, scores them, prints a table.

Reads the stages' results under `runs/<name>`, writes `report.json` and two picture grids there. Accuracy is that
of the shapes scorer on prompts whose colour-shape pair no training caption contained.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from dalle1.atomic_files import atomic, write_json
from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.data.shards import ShardIndex
from dalle1.decode_and_rank import PromptResult
from dalle1.evaluation.pictures import save_picture, to_pictures, to_uint8
from dalle1.evaluation.shapes_scorer import Score, score, summarize
from dalle1.picture_grid import GridBlock, draw_page
from dalle1.pipeline import Pipeline, choose_device
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.progress import ProgressBar

STAGES = ("tokenizer", "dvae", "clip", "transformer")
# What the table says of the dVAE: key in its summary, words, how the number is written.
_DVAE_ROWS = (
    ("psnr_db", "dVAE reconstructions", "{:.1f} dB"),
    ("ssim", "dVAE reconstructions, SSIM", "{:.3f}"),
    ("mse", "dVAE reconstructions, mean squared error", "{:.2g}"),
    ("relaxed_mse", "the same of relaxed codes", "{:.2g}"),
    ("nats_per_dim", "dVAE reconstructions, likelihood", "{:.3f} nats/dim"),
    ("relaxed_nats_per_dim", "the same of relaxed codes", "{:.3f} nats/dim"),
    ("kl_per_position", "dVAE KL", "{:.2f} nats/position"),
    ("kl_weight", "dVAE KL weight at the end", "{:g}"),
    ("temperature", "dVAE temperature at the end", "{:g}"),
    ("codes_used_share", "dVAE codes in use", "{:.0%}"),
    ("dead_codes", "dVAE codes never used", "{:.0f}"),
    ("code_perplexity", "dVAE code perplexity", "{:.1f}"),
)


def make_report(
    results_dir: Path,
    prompts: Sequence[str],
    *,
    candidates: int,
    temperature: float,
    guidance_scale: float | None,
    seed: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Sample and score prompts with the models under `results_dir`; write the grids; return the report.

    Without a `guidance_scale` it is the pipeline's default.

    Raises: FileNotFoundError if a stage has not been trained; ValueError for a wrong number or device.
    """
    started = time.monotonic()
    summaries = {stage: _read_summary(results_dir / stage) for stage in STAGES}
    last = Path("checkpoints") / "last.ckpt"
    pipeline = Pipeline.from_checkpoint(
        transformer=results_dir / "transformer" / last,
        dvae=results_dir / "dvae" / last,
        reranker=CLIPReranker.load(results_dir / "clip" / last),
    ).to(choose_device(device))
    if guidance_scale is None:
        guidance_scale = pipeline.default_guidance_scale
    sampling = SamplingConfig(temperature=temperature, guidance_scale=guidance_scale)
    with ProgressBar() as bar:
        results = pipeline(
            prompts,
            candidates=candidates,
            seed=seed,
            sampling=sampling,
            batch_size=256,
            on_progress=bar.sampled,
            on_finished=bar.finished,
        )
    scores = [_score_candidates(result) for result in results]
    grids = _draw(results, scores, results_dir / "report")
    seconds = {stage: summary["wall_seconds"] for stage, summary in summaries.items()}
    seconds["sampling and scoring"] = round(time.monotonic() - started, 1)
    single = summarize([item for items in scores for item in items])
    best = summarize([items[0] for items in scores])
    return {
        "wall_seconds": round(sum(seconds.values()), 1),
        "wall_seconds_by_stage": seconds,
        "psnr_db": summaries["dvae"]["psnr_db"],
        "codes_used_share": summaries["dvae"]["codes_used_share"],
        "dvae": summaries["dvae"],
        "text_nats_per_token": summaries["transformer"]["text_nats_per_token"],
        "image_nats_per_token": summaries["transformer"]["image_nats_per_token"],
        "n_prompts": len(prompts),
        "prompt_accuracy_single": single["prompt"],
        f"prompt_accuracy_best_of_{candidates}": best["prompt"],
        "accuracy_single": single,
        f"accuracy_best_of_{candidates}": best,
        "prompt_accuracy_by_kind": _by_kind(scores),
        "sampling": asdict(sampling),
        "grids": [str(grid) for grid in grids],
    }


def held_out_prompts(shards: str, count: int) -> list[str]:
    """The first `count` different captions of the test split.

    Raises: ValueError if `count` < 1 or there are fewer; FileNotFoundError if there are no shards.
    """
    require_int("prompts", count, at_least=1)
    captions = list(dict.fromkeys(sample.text() for sample in ShardIndex(shards)))
    if len(captions) < count:
        raise ValueError(f"need {count} different test captions, got {len(captions)} in '{shards}'; make more")
    return captions[:count]


def format_report(report: dict[str, Any]) -> str:
    """The report as the table that the demo ends with."""
    best_key = next(name for name in report if name.startswith("prompt_accuracy_best_of_"))
    best_name = best_key.removeprefix("prompt_accuracy_").replace("_", " ")
    rows = [(f"{stage}, wall time", _minutes(seconds)) for stage, seconds in report["wall_seconds_by_stage"].items()]
    rows += [
        ("all stages, wall time", _minutes(report["wall_seconds"])),
        *((words, _written(report["dvae"].get(key), form)) for key, words, form in _DVAE_ROWS),
        ("text", f"{report['text_nats_per_token']:.3f} nats/token"),
        ("image", f"{report['image_nats_per_token']:.3f} nats/token"),
    ]
    single, best = report["accuracy_single"], report[best_key.removeprefix("prompt_")]
    accuracy = [(name, f"{single[name]:.1%}", f"{best[name]:.1%}") for name in single]
    accuracy[0] = ("whole prompt", *accuracy[0][1:])
    for kind, values in report["prompt_accuracy_by_kind"].items():
        name = f"whole prompt, {kind} ({values['n_prompts']})"
        accuracy.append((name, f"{values['single']:.1%}", f"{values['best']:.1%}"))
    head = (f"{report['n_prompts']} held-out prompts right", "one sample", f"{best_name} by CLIP")
    alarm = f"\nalarm of the dVAE: {report['dvae']['alarm']}" if "alarm" in report["dvae"] else ""
    return f"{tabulate(rows)}\n{tabulate(accuracy, headers=head)}{alarm}"


def _written(value: float | None, form: str) -> str:
    # Runs of earlier versions lack most of these numbers, and SSIM needs pictures of at least 11 pixels.
    return "not measured" if value is None else form.format(value)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _read_summary(directory: Path) -> dict[str, Any]:
    path = directory / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"no '{path}'; run 'python train.py stage={directory.name}' to its end first")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _score_candidates(result: PromptResult) -> list[Score]:
    """Score of each candidate, best-ranked first."""
    return [score(picture, result.prompt) for picture in to_uint8(result.images)]


def _by_kind(scores: Sequence[Sequence[Score]]) -> dict[str, dict[str, float]]:
    """Whole-prompt accuracy of prompts for one object, several equal ones, and two related ones."""
    kinds: dict[str, list[Sequence[Score]]] = {"one object": [], "equal objects": [], "relation": []}
    for items in scores:
        first = items[0]
        related, several = "relation" in first.attributes, len(first.objects_right) > 1
        kinds["relation" if related else "equal objects" if several else "one object"].append(items)
    return {
        kind: {
            "n_prompts": len(prompts),
            "single": float(np.mean([item.right for items in prompts for item in items])),
            "best": float(np.mean([items[0].right for items in prompts])),
        }
        for kind, prompts in kinds.items()
        if prompts
    }


def _draw(results: Sequence[PromptResult], scores: Sequence[Sequence[Score]], directory: Path) -> list[Path]:
    """Two grids: all candidates of the first prompts, and the best candidate of many."""
    candidates = [
        GridBlock(
            title=result.prompt,
            pictures=to_pictures(result.images),
            captions=[
                f"{value:.3f} {'right' if item.right else 'wrong'}"
                for value, item in zip(result.scores or [], items, strict=True)
            ],
        )
        for result, items in list(zip(results, scores, strict=True))[:4]
    ]
    best = GridBlock(
        title=f"Best of {len(results[0].images)} by CLIP for held-out prompts",
        pictures=[to_pictures(result.images[:1])[0] for result in results[:48]],
        captions=[f"{number}. {'right' if items[0].right else 'wrong'}" for number, items in enumerate(scores[:48], 1)],
    )
    paths = [directory / "candidates.png", directory / "best.png"]
    for path, blocks in zip(paths, (candidates, [best]), strict=True):
        save_picture(draw_page(blocks), path)
    prompts = "".join(f"{number}. {result.prompt}\n" for number, result in enumerate(results[:48], 1))
    with atomic(directory / "best.txt") as temporary:
        temporary.write_text(prompts, encoding="utf-8")
    return paths


@errors_in_one_line()
def main() -> None:
    """Command line of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/shapes"), help="directory with the stages' results")
    parser.add_argument("--shards", default="data/shapes/test-*.tar", help="captions to use as prompts")
    parser.add_argument("--prompts", type=int, default=200, help="how many of them")
    parser.add_argument("--candidates", type=int, default=16, help="samples per prompt")
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampling")
    parser.add_argument("--guidance-scale", type=float, help="of sampling; by default what sample.py takes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    report = make_report(
        options.results,
        held_out_prompts(options.shards, options.prompts),
        candidates=options.candidates,
        temperature=options.temperature,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        device=options.device,
    )
    path = options.results / "report.json"
    write_json(path, report)
    print(format_report(report))
    print("\n".join(f"pictures: {grid}" for grid in report["grids"]))
    print(f"numbers:  {path}")


if __name__ == "__main__":
    main()
