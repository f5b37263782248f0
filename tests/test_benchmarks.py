"""The benchmarks' parts that need no peer: fair sizes, and mistakes found before anything takes time."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dalle1.models.accounting import count_weights
from dalle1.models.dvae import DVAE
from dalle1.models.transformer import DalleTransformer, TransformerConfig

ROOT = Path(__file__).parents[1]
# DALLE-pytorch 1.6.6: DiscreteVAE(num_tokens=8192, num_layers=3, codebook_dim=512, hidden_dim=64, num_resnet_blocks=2)
PEER_PARAMETERS = 5_403_011
# The same: DALLE(dim=512, depth=8, heads=8, dim_head=64, num_text_tokens=16384, text_seq_len=256), what it trains
PEER_TRANSFORMER_PARAMETERS = 59_073_792


def test_the_dvae_that_is_compared_is_as_large_as_its_peer() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        model = compose("train", ["stage=dvae", "experiment=photos", "name=test"]).model
    with torch.device("meta"):
        dvae = DVAE(instantiate(model))
    assert sum(p.numel() for p in dvae.parameters()) == pytest.approx(PEER_PARAMETERS, rel=0.1)
    assert (dvae.config.downsampling, dvae.config.vocab_size) == (8, 8192)


def test_the_transformer_that_is_compared_is_as_large_as_its_peer() -> None:
    sizes = {"d_model": 512, "n_layers": 8, "n_heads": 8}
    with torch.device("meta"):
        models = {ratio: DalleTransformer(TransformerConfig(**sizes, mlp_ratio=ratio)) for ratio in (4, 6)}
    assert count_weights(models[6]).total == pytest.approx(PEER_TRANSFORMER_PARAMETERS, rel=0.01)
    assert count_weights(models[4]).total < PEER_TRANSFORMER_PARAMETERS


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("transformer.py", ["--rounds", "0"], "error: --rounds must be >= 1, got 0"),
        ("memory.py", ["--devices", "4", "1"], "error: --devices must be >= 2, got 1"),
        ("data.py", ["--rounds", "0"], "error: --rounds must be >= 1, got 0"),
        ("data_soak.py", ["--batches", "10"], "error: --batches must be >= 1000, got 10"),
        ("evaluation.py", ["--pictures", "3"], "error: --pictures must be >= 4, got 3"),
        ("transformer_loss.py", ["--minutes", "0"], "error: --minutes must be > 0, got 0.0"),
        ("transformer_loss.py", ["--updates", "3"], "error: --updates must be >= 200, got 3"),
        ("communication.py", ["--updates", "3"], "error: --updates must be >= 200, got 3"),
        ("communication.py", ["--seeds", "1"], "error: --seeds must be >= 2, got 1"),
        ("scaling_law.py", ["--updates", "3"], "error: --updates must be >= 10, got 3"),
        ("sweep_accuracy.py", ["nowhere/*"], "error: runs must be directories, there are none for nowhere/*"),
        ("sweep_accuracy.py", ["x", "--candidates", "0"], "error: --candidates must be >= 1, got 0"),
        ("sampling.py", ["--repeats", "0"], "error: --repeats must be >= 1, got 0"),
        ("gpu.py", ["--batch", "0"], "error: --batch must be >= 1, got 0"),
        ("gpu.py", ["--steps", "0"], "error: --steps must be >= 1, got 0"),
    ],
)
def test_options_that_cannot_work_are_one_sentence(
    script: str, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: to start Python and torch for each takes ten times as long.
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.strip() == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpus_benchmark_needs_a_gpu() -> None:
    result = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: this benchmark must run on a CUDA device, got none")


def test_steps_take_turns_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    measure = importlib.import_module("measure")
    makers = {"a": (dict, ()), "b": (list, ())}  # a step that is a class: it makes an empty one
    monkeypatch.setattr(measure, "tqdm", lambda rounds, **_: rounds)
    results = measure.time_in_turns(
        {name: (partial, (make, *arguments)) for name, (make, arguments) in makers.items()},
        rounds=2,
        environment={"MALLOC_TRIM_THRESHOLD_": "1"},
        title="",
    )
    assert set(results) == {"a", "b"}
    assert all(0 < seconds < 1 and 0.01 < gigabytes < 10 for seconds, gigabytes in results.values())
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


def test_missing_pictures_are_found_first() -> None:
    command = [sys.executable, "benchmarks/dvae.py", "--train", "nowhere/*.tar", "--val", "nowhere.tar"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no shards match 'nowhere/*.tar'")
    assert result.stderr.count("\n") == 1


def test_a_scaling_law_is_found_in_points_that_lie_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    law = importlib.import_module("scaling_law")
    compute = np.geomspace(1e11, 1e14, 6)
    found = law.fit_power_law(compute, 0.06 + (compute / 3e10) ** -0.4)
    assert found["L0"] == pytest.approx(0.06, rel=1e-3)
    assert found["a"] == pytest.approx(0.4, rel=1e-3)
    assert found["C1"] == pytest.approx(3e10, rel=1e-2)
    assert all(error < 1e-3 for error in found["standard_errors"].values())
    with pytest.raises(ValueError, match="at least 4 points, got 3"):
        law.fit_power_law(compute[:3], compute[:3])


def test_sizes_of_the_scaling_law_are_transformers_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    law = importlib.import_module("scaling_law")
    weights = []
    for size in law.SIZES:
        cfg = law.configuration(*law.options_of(*size, updates=100))
        assert cfg.optim.lr * cfg.model.d_model == pytest.approx(4e-3 * 128, rel=1e-3)
        with torch.device("meta"):
            weights.append(count_weights(DalleTransformer(instantiate(cfg.model))).total)
    assert weights == sorted(weights)
    demo = law.configuration("stage=transformer", "experiment=shapes")
    of_demo = law.configuration(*law.options_of(4, 128, updates=demo.optim.max_steps))
    assert of_demo.model == demo.model
    assert of_demo.optim == demo.optim
