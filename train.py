"""Do one stage: `python train.py stage=tokenizer | dvae | clip | tokens | transformer` (see conf/train.yaml)."""

import sys
from pathlib import Path

from dalle1.cli import errors_in_one_line, run_script
from dalle1.training.launch import is_part_of_job, refuse_sweep_of_launched_processes, run_part_of_job, start

if __name__ == "__main__":
    if is_part_of_job():
        run_part_of_job()
        sys.exit()
    with errors_in_one_line():
        refuse_sweep_of_launched_processes(sys.argv[1:])
    paths = ("train", "val", "tokens")
    run_script(
        start,
        config_dir=Path(__file__).parent / "conf",
        config_name="train",
        text_options=("data.background",),
        path_options=("name", "run_dir", "results_dir", "dvae", "text_tokenizer", *(f"data.{each}" for each in paths)),
    )
