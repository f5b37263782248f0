"""The benchmark's parts that need no peer: fair sizes, and mistakes found before anything takes time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dalle1.models.dvae import DVAE

ROOT = Path(__file__).parents[1]
# DALLE-pytorch 1.6.6: DiscreteVAE(num_tokens=8192, num_layers=3, codebook_dim=512, hidden_dim=64, num_resnet_blocks=2)
PEER_PARAMETERS = 5_403_011


def test_the_dvae_that_is_compared_is_as_large_as_its_peer() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        model = compose("train", ["stage=dvae", "experiment=photos", "name=test"]).model
    with torch.device("meta"):
        dvae = DVAE(instantiate(model))
    assert sum(p.numel() for p in dvae.parameters()) == pytest.approx(PEER_PARAMETERS, rel=0.1)
    assert (dvae.config.downsampling, dvae.config.vocab_size) == (8, 8192)


def test_missing_pictures_are_found_first() -> None:
    command = [sys.executable, "benchmarks/dvae.py", "--train", "nowhere/*.tar", "--val", "nowhere.tar"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no shards match 'nowhere/*.tar'")
    assert result.stderr.count("\n") == 1
