"""Trains all three networks on one of several ranks: what `torchrun equal_runs.py DIRECTORY DATA OPTIONS...` starts.

With one rank, tests import `train_all` instead. Every rank gets `DIRECTORY/<stage>`; options are for all stages.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

CONF = Path(__file__).parents[2] / "conf"
GLOBAL_BATCH = 8
UPDATES = 20
COMMON = (
    *("image_size=16", "image_vocab_size=16", "grid_size=4", "text_vocab_size=300", "text_seq_len=64"),
    *(
        "name=test",
        "data.recipe=null",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=1000",
    ),
    *(f"optim.max_steps={UPDATES}", "optim.warmup_steps=2"),
    # Adam makes as much of a gradient's rounding error as of a gradient where both are near zero.
    "optim.eps=1e-4",
)
STAGES = {
    # Noise, annealed, from the first update on.
    "dvae": ("model.patch_size=4", "model.n_hid=16", "model.n_init=16", "optim.codebook_start_step=0"),
    "clip": (
        *("model.image_width=16", "model.image_layers=1", "model.text_width=16", "model.text_layers=1"),
        "model.patch_size=8",
    ),
    "transformer": (
        *("model.d_model=16", "model.n_layers=3", "model.n_heads=2", "model.conv_kernel_size=3"),
        *("optim.caption_dropout=0.0", "compute.attention_backend=local"),
    ),
}


def train_all(
    directory: Path, data: Path, *options: str, parts: int = 1, stages: tuple[str, ...] = tuple(STAGES)
) -> None:
    """Train the stages with the text tokenizer in `directory`, `parts` batches to an update."""
    from dalle1.training.run import run

    batch = GLOBAL_BATCH // parts
    for stage in stages:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(
                "train",
                overrides=[
                    *(f"stage={stage}", *COMMON, *STAGES[stage], f"optim.batch_size={batch}"),
                    *(f"results_dir={directory}", f"run_dir={directory / stage}"),
                    *(f"data.train={data}/train-*.tar", f"data.val={data}/val-*.tar", *options),
                ],
            )
        run(cfg)


if __name__ == "__main__":
    world = int(os.environ["WORLD_SIZE"])
    ddp = ("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world}")
    train_all(Path(sys.argv[1]), Path(sys.argv[2]), *ddp, *sys.argv[3:], parts=world)
