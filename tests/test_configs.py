"""Every YAML under conf/ composes and builds; wrong choices get one sentence."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from dalle1.data.config import DataConfig
from dalle1.data.filters import FilterConfig
from dalle1.models.accounting import count_weights
from dalle1.models.clip import CLIP, CLIPConfig
from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.rerank.choose import Kind
from dalle1.tokenizers.text import TextTokenizerConfig
from dalle1.training.communication import Communication
from dalle1.training.dvae_module import DVAEOptimConfig
from dalle1.training.optim import OptimConfig
from dalle1.training.run import build
from dalle1.training.tokens_stage import TokensConfig
from dalle1.training.transformer_module import ComputeConfig, TransformerOptimConfig

CONF = Path(__file__).parents[1] / "conf"
STAGES = sorted(path.stem for path in (CONF / "stage").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODEL_TYPES = {
    "tokenizer": TextTokenizerConfig,
    "dvae": DVAEConfig,
    "clip": CLIPConfig,
    "transformer": TransformerConfig,
}
OPTIM_TYPES = {"dvae": DVAEOptimConfig, "clip": OptimConfig, "transformer": TransformerOptimConfig}
PART_TYPES = {"logger": pl.loggers.Logger, "callbacks": pl.Callback}
SHARDS = ["data.train=train.tar", "data.val=val.tar"]


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str, tmp: Path | str = "unused") -> DictConfig:
    # Outside of a running job there is no hydra: name and run_dir are what it would give.
    return compose("train", overrides=[*overrides, "name=test", f"run_dir={tmp}"])


def _shared_sizes(cfg: DictConfig, stage: str) -> dict[str, int]:
    text = {"text_vocab_size": cfg.text_vocab_size, "text_seq_len": cfg.text_seq_len}
    image = {"image_vocab_size": cfg.image_vocab_size, "grid_height": cfg.grid_size, "grid_width": cfg.grid_size}
    return {
        "tokenizer": {"vocab_size": cfg.text_vocab_size, "seq_len": cfg.text_seq_len},
        "dvae": {"vocab_size": cfg.image_vocab_size, "downsampling": cfg.image_size // cfg.grid_size},
        "clip": text,
        "transformer": {**text, **image},
    }[stage]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_stage_of_experiment_builds(stage: str, experiment: str) -> None:
    cfg = composed(f"stage={stage}", f"experiment={experiment}", *SHARDS)

    data = build(cfg, "data", DataConfig)
    assert data.image_size == cfg.image_size
    if stage == "tokens":
        assert TokensConfig(crops=cfg.stage.crops, batch_size=cfg.stage.batch_size) == TokensConfig()
        return
    model: Any = build(cfg, "model", MODEL_TYPES[stage])
    # The sizes that stages must agree on come from one place.
    for name, value in _shared_sizes(cfg, stage).items():
        assert getattr(model, name) == value, name
    if stage in OPTIM_TYPES:
        optim: Any = build(cfg, "optim", OPTIM_TYPES[stage])
        assert data.batch_size == optim.batch_size


RERANKERS = sorted(CONF.glob("rerank/*.yaml"))
CHOICES = sorted(set(CONF.glob("*/*.yaml")) - set(RERANKERS))


@pytest.mark.parametrize("path", RERANKERS, ids=lambda path: path.stem)
def test_every_reranker_composes_and_is_known(path: Path) -> None:
    cfg = compose("sample", [f"rerank={path.stem}"])
    assert cfg.rerank.kind == path.stem
    assert set(cfg.rerank) == {"kind", "model", "only", "allow_download"}
    assert path.stem in get_args(Kind)
    assert len(RERANKERS) == len(get_args(Kind))


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_choice_composes_and_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    group = path.parent.name
    stage = next((stage for stage in STAGES if path.stem.startswith(stage)), "dvae")
    choice = path.stem if group != "stage" else stage
    # A model fits the sizes of the experiment that it is named after.
    experiment = next((name for name in EXPERIMENTS if path.stem.endswith(name)), "shapes")
    cfg = composed(f"stage={stage}", f"experiment={experiment}", *SHARDS, f"{group}={choice}", tmp=tmp_path)

    built = instantiate(cfg[group], _convert_="all") if group in cfg else cfg
    if group in ("logger", "callbacks"):
        assert built, "an empty group"
        assert all(isinstance(each, PART_TYPES[group]) for each in built.values())
    elif group == "stage":
        assert built["name"] == stage
    elif group == "trainer":
        assert set(built) <= set(inspect.signature(pl.Trainer).parameters)
    elif group == "experiment":
        assert build(cfg, "data", DataConfig).image_size == cfg.image_size
    else:
        assert isinstance(
            built,
            {
                "data": DataConfig,
                "model": MODEL_TYPES.get(stage),
                "optim": OPTIM_TYPES.get(stage),
                "compute": ComputeConfig,
                "communication": Communication,
                "filters": FilterConfig,
            }[group],
        )


def test_every_yaml_is_covered() -> None:
    top = {path.name for path in CONF.glob("*.yaml")}
    assert top == {"train.yaml", "sample.yaml", "app.yaml", "plan.yaml", "inspect.yaml"}
    assert {path.parent.parent for path in CONF.rglob("*/*.yaml")} == {CONF}, "a file deeper than one group"


@pytest.mark.parametrize(
    "path",
    [
        path
        for group in ("model", "optim", "data", "compute", "communication")
        for path in sorted((CONF / group).glob("*.yaml"))
    ],
    ids=lambda path: f"{path.parent.name}={path.stem}",
)
def test_every_field_of_a_configuration_is_written_down(path: Path) -> None:
    # Else `--help` would not show it, and the command line could set it only with a `+`.
    group = path.parent.name
    stage = next((stage for stage in STAGES if path.stem.startswith(stage)), "dvae")
    content = composed(f"stage={stage}", *SHARDS, f"{group}={path.stem}")[group]
    fields = {field.name for field in dataclasses.fields(get_class(content["_target_"]))}
    assert content.keys() - {"_target_"} == fields


def test_paper_models_have_the_papers_sizes() -> None:
    dvae = build(composed("stage=dvae", "experiment=paper", *SHARDS), "model", DVAEConfig)
    transformer = build(composed("stage=transformer", "experiment=paper", *SHARDS), "model", TransformerConfig)
    clip = build(composed("stage=clip", "experiment=paper", *SHARDS), "model", CLIPConfig)
    with torch.device("meta"):
        image_model, text_to_image, _ = DVAE(dvae), DalleTransformer(transformer), CLIP(clip)

    encoder = sum(p.numel() for p in image_model.encoder.parameters())
    assert encoder == 53_786_240
    # The decoder's first convolution is the codebook.
    assert sum(p.numel() for p in image_model.parameters()) - encoder == 43_829_766
    # Without embeddings and unembeddings, as the paper counts.
    assert 12.0e9 <= count_weights(text_to_image).blocks <= 12.2e9
    assert (dvae.downsampling, dvae.vocab_size) == (8, 8192)
    assert (transformer.text_seq_len, transformer.image_seq_len) == (256, 1024)
    assert (transformer.n_layers, transformer.n_heads, transformer.d_model) == (64, 62, 3968)


@pytest.mark.parametrize(
    ("size", "depth", "width"),
    [
        ("tiny", 4, 256),
        ("small", 8, 512),
        ("base", 12, 768),
        ("large", 24, 1024),
        ("xl", 24, 2048),
        ("paper_2.8b", 64, 1920),
        ("paper_5.6b", 64, 2688),
        ("paper_12b", 64, 3968),
    ],
)
def test_sizes_of_the_transformer_have_the_weights_that_their_files_name(size: str, depth: int, width: int) -> None:
    cfg = composed("stage=transformer", "experiment=paper", f"model=transformer_{size}", *SHARDS)
    config = build(cfg, "model", TransformerConfig)
    assert (config.n_layers, config.d_model, config.d_model // config.n_heads) == (depth, width, 64)
    with torch.device("meta"):
        weights = count_weights(DalleTransformer(config))
    comment = (CONF / "model" / f"transformer_{size}.yaml").read_text().split("defaults:")[0]
    named = re.findall(r"([\d.,]+) million", comment)
    assert named == [f"{count / 1e6:,.1f}" for count in (weights.total, weights.blocks)]


@pytest.mark.parametrize(
    ("stage", "augmentation"),
    [("tokenizer", "none"), ("dvae", "dvae"), ("transformer", "transformer"), ("clip", "transformer")],
)
def test_paper_augments_as_its_listings_do(stage: str, augmentation: str) -> None:
    data = build(composed(f"stage={stage}", "experiment=paper", *SHARDS), "data", DataConfig)
    assert (data.augmentation, data.image_size, data.small_pictures) == (augmentation, 256, "enlarge")
    assert build(composed(f"stage={stage}"), "data", DataConfig).augmentation == "none"


def test_experiment_overrides_groups_and_the_command_line_overrides_the_experiment() -> None:
    assert composed("stage=dvae").image_size != 256
    assert composed("stage=dvae", "experiment=paper", *SHARDS).image_size == 256
    assert composed("stage=dvae", "experiment=paper", "image_size=128", *SHARDS).data.image_size == 128
    assert composed("stage=dvae", "experiment=paper", "model=dvae_shapes", *SHARDS).model.patch_size == 5


def test_missing_stage_lists_the_choices() -> None:
    with pytest.raises(ConfigCompositionException, match=r"(?s)stage.*clip.*dvae.*tokenizer.*transformer"):
        compose("train")


def test_unknown_choice_lists_the_choices() -> None:
    with pytest.raises(MissingConfigException, match=r"(?s)stage/dvea.*clip.*dvae"):
        composed("stage=dvea")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=transformer", "model=dvae_shapes"], "stage=transformer needs a TransformerConfig, got a DVAEConfig"),
        (["stage=dvae", "model=transformer_shapes"], "stage=dvae needs a DVAEConfig, got a TransformerConfig"),
    ],
)
def test_model_of_another_stage_is_refused(overrides: list[str], message: str) -> None:
    stage = overrides[0].removeprefix("stage=")
    with pytest.raises(ValueError, match=message):
        build(composed(*overrides), "model", MODEL_TYPES[stage])


def test_misspelt_optim_is_refused() -> None:
    with pytest.raises(ValueError, match="stage=dvae needs a DVAEOptimConfig, got none"):
        build(composed("stage=dvae", "optim=dvae_shaeps"), "optim", DVAEOptimConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=many", "DVAEConfig.vocab_size must be a whole number, got 'many'"),
        ("model.n_hid=30", "n_hid must be divisible by 4.*got 30"),
        ("+model.vocab_sise=3", "unexpected keyword argument 'vocab_sise'"),
        ("optim.lr=-1", r"optim.lr must be a finite number > 0, got -1"),
        ("optim.max_steps=0", r"optim.max_steps must be >= 1, got 0"),
        ("optim.beta2=1.5", r"optim.beta2 must be in \[0, 1\), got 1.5"),
    ],
)
def test_wrong_value_names_the_field(override: str, message: str) -> None:
    cfg = composed("stage=dvae", override)
    group = override.lstrip("+").partition(".")[0]
    with pytest.raises(Exception, match=message):
        build(cfg, group, DVAEConfig if group == "model" else DVAEOptimConfig)
