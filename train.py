"""Do one stage: `python train.py stage=tokenizer | dvae | clip | tokens | transformer` (see conf/train.yaml)."""

from pathlib import Path

from dalle1.cli import run_script
from dalle1.training.run import run

if __name__ == "__main__":
    paths = ("train", "val", "tokens")
    run_script(
        run,
        config_dir=Path(__file__).parent / "conf",
        config_name="train",
        text_options=("data.background",),
        path_options=("name", "run_dir", "results_dir", "dvae", "text_tokenizer", *(f"data.{each}" for each in paths)),
    )
