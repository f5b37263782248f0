"""Sample pictures: `python sample.py prompt="a red circle above a blue square"`; options are in conf/sample.yaml."""

from pathlib import Path

from omegaconf import DictConfig

from dalle1.cli import run_script


def sample(cfg: DictConfig) -> None:
    """Do what the configuration asks for, and say where the pictures are."""
    from dalle1.sample import run  # here, so that --help and mistyped options answer at once

    print(run(cfg))


def main() -> None:
    """Run `sample` with what the command line asks for."""
    models = ("name", "results_dir", "transformer", "dvae", "rerank.model")
    run_script(
        sample,
        config_dir=Path(__file__).resolve().parent / "conf",
        config_name="sample",
        text_options=("prompt", "negative_prompt"),
        path_options=("prompts_file", "image", "mask", *models, "rerank.only", "out"),
    )


if __name__ == "__main__":
    main()
