"""TensorBoard, only when asked for: curves and pictures of all starts of a run in one directory."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from dalle1.training.disk_full import going_on_if_disk_is_full


class TensorBoard(TensorBoardLogger):
    """Writes events into `directory`; a start of the run hides what earlier ones said of updates that it makes again.

    On a disk that is full, nothing more of this start is written, and training goes on."""

    def __init__(self, directory: str) -> None:
        """Nothing is written before something is logged. Raises: ValueError if TensorBoard is not installed."""
        if find_spec("tensorboard") is None:
            raise ValueError(
                "logger=tensorboard needs tensorboard, which is not installed; "
                "pip install '.[tensorboard]' in the project's directory"
            )
        super().__init__(directory, name="", version="")

    def begin(self, step: int) -> None:
        """Go on after `step` updates, before anything is logged: Lightning gives the next one this number."""
        self._kwargs["purge_step"] = step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each curve."""
        with going_on_if_disk_is_full(self.log_dir):
            for name, value in metrics.items():
                self.experiment.add_scalar(name, value, step)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Show a picture of this step."""
        with going_on_if_disk_is_full(self.log_dir):
            self.experiment.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged. Lightning's own would add a file of options, which are in config.yaml."""
        with going_on_if_disk_is_full(self.log_dir):
            self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; whatever is logged after this begins another one."""
        if self._experiment is not None:
            with going_on_if_disk_is_full(self.log_dir):
                self._experiment.close()
