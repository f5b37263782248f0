"""Sample pictures: `python sample.py prompt="a red circle above a blue square"`; options are in conf/sample.yaml."""

from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig

from dalle1.cli import run_script


def sample(cfg: DictConfig) -> None:
    """Do what the configuration asks for, and say where the pictures are."""
    # Imported here, so that --help and mistyped options answer at once.
    from dalle1.atomic_files import check_directory
    from dalle1.pipeline import Pipeline, choose_device
    from dalle1.results import default_directory, write_run
    from dalle1.sampling.filters import SamplingConfig
    from dalle1.sampling.progress import progress_bar
    from dalle1.sampling.prompts import read_prompts

    prompts = read_prompts(cfg.prompt, cfg.prompts_file)
    numbers = {"candidates": cfg.candidates, "seed": cfg.seed, "batch_size": cfg.batch_size}
    guidance_scale = 1.0 if cfg.guidance_scale is None else cfg.guidance_scale
    sampling = SamplingConfig(
        temperature=cfg.temperature,
        temperature_end=cfg.temperature_end,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        guidance_scale=guidance_scale,
    )
    out = None if cfg.out is None else check_directory(cfg.out)
    device = choose_device(cfg.device)
    pipeline = Pipeline.from_checkpoints(transformer=cfg.transformer, dvae=cfg.dvae, clip=clip_path(cfg)).to(device)
    if cfg.guidance_scale is None:
        sampling = replace(sampling, guidance_scale=pipeline.default_guidance_scale)
    with progress_bar() as on_progress:
        results = pipeline(
            prompts, sampling=sampling, negative_prompt=cfg.negative_prompt, on_progress=on_progress, **numbers
        )
    out = out or default_directory(f"runs/{cfg.name}/samples", prompts)
    settings = {str(name): value for name, value in cfg.items()} | asdict(sampling)
    print(write_run(results, out, settings=settings, checkpoints=pipeline.checkpoints))


def clip_path(cfg: DictConfig) -> str | None:
    """The checkpoint to rank with, or None for no ranking."""
    if cfg.rerank not in ("clip", "none"):
        raise ValueError(f"rerank must be clip or none, got {cfg.rerank!r}")
    if cfg.rerank == "clip" and not Path(cfg.clip).exists():
        raise FileNotFoundError(f"no CLIP at '{cfg.clip}'; train it (stage=clip), or do without ranking: rerank=none")
    return cfg.clip if cfg.rerank == "clip" else None


def main() -> None:
    """Run `sample` with what the command line asks for."""
    run_script(
        sample,
        config_dir=Path(__file__).resolve().parent / "conf",
        config_name="sample",
        text_options=("prompt", "negative_prompt"),
        path_options=("prompts_file", "name", "transformer", "dvae", "clip", "out"),
    )


if __name__ == "__main__":
    main()
