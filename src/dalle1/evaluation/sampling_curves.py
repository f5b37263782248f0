"""How much ranking and guidance help, on the generated scenes: `python -m dalle1.evaluation.sampling_curves`.

Two curves of the share of held-out prompts whose picture is right (see `shapes_scorer`): against the number of
candidates that a reranker chooses one from, which is the paper's figure 9(c) with accuracy for its Inception score and
FID; and against the guidance scale. Writes `sampling_curves.json` and `sampling_curves.png` under `runs/<name>/report`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from dalle1.atomic_files import write_json
from dalle1.checkpoint import load_image_tokenizer, load_transformer
from dalle1.cli import errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.decode_and_rank import PromptResult
from dalle1.evaluation.pictures import picture_of, save_picture, to_uint8
from dalle1.evaluation.report import held_out_prompts
from dalle1.evaluation.shapes_scorer import score
from dalle1.pipeline import Pipeline, choose_device
from dalle1.rerank.likelihood import LikelihoodReranker
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.rerank.reranker import Reranker
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.progress import ProgressBar

GUIDANCE_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
# What sample.py does by default, and the model's own distribution, which the paper samples from.
TEMPERATURES = (0.7, 1.0)
_GUIDED_CANDIDATES = 4  # of each prompt and scale; nothing is chosen among them


@dataclass(frozen=True, kw_only=True)
class Point:
    """A share of prompts that are right, and its standard error over prompts."""

    accuracy: float
    standard_error: float

    @classmethod
    def of(cls, shares: Sequence[float]) -> Point:
        """From the share of each prompt: between 0 and 1."""
        deviation = float(np.std(shares, ddof=1)) if len(shares) > 1 else math.nan
        return cls(accuracy=float(np.mean(shares)), standard_error=deviation / math.sqrt(len(shares)))


def best_of(right: Bool[Tensor, " m"], scores: Float[Tensor, " m"], n: int) -> float:
    """Probability that the best by `scores` of n candidates is right, when the n are drawn from all m at random.

    Exactly: the candidate on place i, from 0, is the best of (m - 1 - i choose n - 1) draws out of (m choose n). Equal
    scores keep their order.

    Raises: ValueError unless 1 <= n <= m.
    """
    m = len(right)
    if not 1 <= n <= m:
        raise ValueError(f"n must be in [1, {m}], the number of candidates, got {n}")
    order = scores.argsort(descending=True, stable=True)
    draws = math.comb(m, n)
    return sum(math.comb(m - 1 - place, n - 1) / draws for place, i in enumerate(order.tolist()) if right[i])


def counts_up_to(candidates: int) -> list[int]:
    """1, 2, 4, ... and `candidates` itself."""
    return sorted({2**power for power in range(candidates.bit_length())} | {candidates})


def make_curves(
    pipeline: Pipeline, rerankers: dict[str, Reranker], prompts: Sequence[str], *, candidates: int, seed: int
) -> dict[str, Any]:
    """Both curves, in plain types.

    Args:
        pipeline: Samples, without a reranker of its own.
        rerankers: By name; `nothing`, which chooses at random, comes on top.
        prompts: Of the generated scenes.
        candidates: The most that are chosen from.
        seed: Of sampling.
    """
    best: dict[str, dict[str, list[dict[str, float]]]] = {}
    guidance: dict[str, list[dict[str, float]]] = {}
    default = pipeline.default_guidance_scale
    for temperature in TEMPERATURES:
        # With the lower temperature as sample.py does, else as the paper: without guidance.
        scale = default if temperature != 1 else 1.0
        config = SamplingConfig(temperature=temperature, guidance_scale=scale)
        name = f"temperature {temperature:g}, guidance {scale:g}"
        best[name] = _best_of_curves(pipeline, rerankers, prompts, config, candidates, seed)
        points = []
        for each in GUIDANCE_SCALES if default != 1 else (1.0,):
            config = SamplingConfig(temperature=temperature, guidance_scale=each)
            shares = [
                float(np.mean(_right(result)))
                for result in _sample(pipeline, prompts, config, _GUIDED_CANDIDATES, seed)
            ]
            points.append({"guidance_scale": each} | asdict(Point.of(shares)))
        guidance[f"temperature {temperature:g}"] = points
    return {
        "prompts": len(prompts),
        "candidates": candidates,
        "candidates_per_guidance_scale": _GUIDED_CANDIDATES,
        "seed": seed,
        "checkpoints": pipeline.checkpoints,
        "rerankers": {name: dict(reranker.facts) for name, reranker in rerankers.items()},
        "best_of": best,
        "guidance": guidance,
    }


def _best_of_curves(
    pipeline: Pipeline,
    rerankers: dict[str, Reranker],
    prompts: Sequence[str],
    config: SamplingConfig,
    candidates: int,
    seed: int,
) -> dict[str, list[dict[str, float]]]:
    counts = counts_up_to(candidates)
    shares: dict[str, list[list[float]]] = {name: [] for name in (*rerankers, "nothing")}
    for result in _sample(pipeline, prompts, config, candidates, seed):
        right = torch.tensor(_right(result))
        for name, reranker in rerankers.items():
            scores = reranker.score(result.prompt, result.images, result.image_tokens)
            shares[name].append([best_of(right, scores, n) for n in counts])
        shares["nothing"].append([float(right.double().mean())] * len(counts))
    return {
        name: [{"n": n} | asdict(Point.of([row[i] for row in rows])) for i, n in enumerate(counts)]
        for name, rows in shares.items()
    }


def _sample(
    pipeline: Pipeline, prompts: Sequence[str], config: SamplingConfig, candidates: int, seed: int
) -> Iterator[PromptResult]:
    with ProgressBar() as bar:
        yield from pipeline.stream(
            prompts,
            candidates=candidates,
            seed=seed,
            sampling=config,
            on_progress=bar.sampled,
            on_finished=bar.finished,
        )


def _right(result: PromptResult) -> list[bool]:
    return [score(picture, result.prompt).right for picture in to_uint8(result.images)]


def draw_curves(curves: dict[str, Any]) -> Image.Image:
    """A plot for each setting of the best of N, and one for guidance, with two standard errors as bands."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 3.4), dpi=90, layout="constrained")
    *best, guided = figure.subplots(1, len(curves["best_of"]) + 1, sharey=True)
    for axes, (setting, lines) in zip(best, curves["best_of"].items(), strict=True):
        for name, points in lines.items():
            _draw_line(axes, points, "n", label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="candidates, of which the best is taken")
        axes.set_title(setting, fontsize=9)
    best[0].set_ylabel("prompts that are right")
    for setting, points in curves["guidance"].items():
        _draw_line(guided, points, "guidance_scale", label=setting)
    guided.set(xlabel="guidance scale", ylim=(0, 1))
    guided.set_title("one sample", fontsize=9)
    for axes in (*best, guided):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    return picture_of(figure)


def _draw_line(axes: Any, points: Sequence[dict[str, float]], x: str, *, label: str) -> None:
    places = [point[x] for point in points]
    values, errors = (np.array([point[name] for point in points]) for name in ("accuracy", "standard_error"))
    (line,) = axes.plot(places, values, label=label, marker=".")
    low, high = (values - 2 * errors).clip(0, 1), (values + 2 * errors).clip(0, 1)
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.12, linewidth=0)


def format_curves(curves: dict[str, Any]) -> str:
    """The numbers as tables."""
    from tabulate import tabulate

    parts = []
    for setting, lines in curves["best_of"].items():
        counts = [point["n"] for point in next(iter(lines.values()))]
        rows = [[name, *(f"{point['accuracy']:.1%}" for point in points)] for name, points in lines.items()]
        parts.append(tabulate(rows, headers=[f"best of N by ... ({setting})", *map(str, counts)]))
    rows = [[name, *(f"{point['accuracy']:.1%}" for point in points)] for name, points in curves["guidance"].items()]
    scales = [f"{point['guidance_scale']:g}" for point in next(iter(curves["guidance"].values()))]
    parts.append(tabulate(rows, headers=["guidance scale, one sample", *scales]))
    return "\n\n".join(parts)


@errors_in_one_line()
def main() -> None:
    """Command line of the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/shapes"), help="directory with the stages' results")
    parser.add_argument("--shards", default="data/shapes/test-*.tar", help="captions to use as prompts")
    parser.add_argument("--prompts", type=int, default=200, help="how many of them")
    parser.add_argument("--candidates", type=int, default=128, help="samples per prompt")
    parser.add_argument("--out", type=Path, help="directory to write to (by default report/ of the results)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    require_int("candidates", options.candidates, at_least=1)
    prompts = held_out_prompts(options.shards, options.prompts)
    device = choose_device(options.device)
    last = Path("checkpoints") / "last.ckpt"
    clip = CLIPReranker.load(options.results / "clip" / last)
    image_tokenizer = load_image_tokenizer(options.results / "dvae" / last)
    transformer = load_transformer(options.results / "transformer" / last)
    rerankers: dict[str, Reranker] = {"CLIP": clip, "image likelihood": LikelihoodReranker(transformer, of="image")}
    if transformer.caption_dropout:
        rerankers["caption likelihood"] = LikelihoodReranker(transformer, of="caption")
    clip.to(device)
    pipeline = Pipeline(transformer, image_tokenizer).to(device)
    curves = make_curves(pipeline, rerankers, prompts, candidates=options.candidates, seed=options.seed)
    out = options.out or options.results / "report"
    numbers, picture = (out / f"sampling_curves.{ending}" for ending in ("json", "png"))
    write_json(numbers, curves)
    save_picture(draw_curves(curves), picture)
    print(f"{format_curves(curves)}\n\npicture: {picture}\nnumbers: {numbers}")


if __name__ == "__main__":
    main()
