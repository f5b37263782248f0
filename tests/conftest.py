"""Tiny models with random weights, and their checkpoints as training writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle1.checkpoint import make_record, weights_sha256
from dalle1.models.clip import CLIP, CLIPConfig
from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig

# Pictures are 12 x 16 pixels: nowhere square, so that a swap of the axes shows.
TEXT_VOCAB_SIZE, TEXT_SEQ_LEN, IMAGE_VOCAB_SIZE, GRID, PATCH = 300, 40, 32, (3, 4), 4


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests remember nothing in the user's cache directory, nor do the processes that they start."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DALLE1_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def _randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter a value that matters; fresh models have zeros in places (the heads, for one)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def make_transformer() -> Callable[..., DalleTransformer]:
    """Makes a tiny transformer in evaluation mode; keywords override its configuration."""

    def make(seed: int = 0, **overrides: object) -> DalleTransformer:
        sizes: dict[str, object] = {
            "text_vocab_size": TEXT_VOCAB_SIZE,
            "image_vocab_size": IMAGE_VOCAB_SIZE,
            "text_seq_len": TEXT_SEQ_LEN,
            "grid_height": GRID[0],
            "grid_width": GRID[1],
            "n_layers": 4,
            "n_heads": 2,
            "d_model": 16,
            "conv_kernel_size": 3,
        }
        model = DalleTransformer(TransformerConfig(**(sizes | overrides)))  # type: ignore[arg-type]
        _randomize(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_dvae() -> Callable[..., DVAE]:
    """Makes a tiny dVAE in evaluation mode; keywords override its configuration."""

    def make(seed: int = 1, **overrides: object) -> DVAE:
        sizes: dict[str, object] = {
            "vocab_size": IMAGE_VOCAB_SIZE,
            "n_hid": 8,
            "n_init": 8,
            "n_groups": 1,
            "n_blocks_per_group": 1,
            "patch_size": PATCH,
        }
        model = DVAE(DVAEConfig(**(sizes | overrides)))  # type: ignore[arg-type]
        _randomize(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., CLIP]:
    """Makes a tiny CLIP in evaluation mode; keywords override its configuration."""

    def make(seed: int = 2, **overrides: object) -> CLIP:
        sizes: dict[str, object] = {
            "image_size": 16,
            "patch_size": 8,
            "image_width": 16,
            "image_layers": 1,
            "image_heads": 2,
            "text_vocab_size": TEXT_VOCAB_SIZE,
            "text_seq_len": TEXT_SEQ_LEN,
            "text_width": 16,
            "text_layers": 2,
            "text_heads": 2,
            "embed_dim": 8,
        }
        model = CLIP(CLIPConfig(**(sizes | overrides)))  # type: ignore[arg-type]
        _randomize(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def text_tokenizer() -> TextTokenizer:
    """A tokenizer with a few merges, as long as the tiny models' text."""
    captions = ["a red circle", "a blue square on the left", "two green stars"]
    return TextTokenizer.train(captions, TextTokenizerConfig(vocab_size=TEXT_VOCAB_SIZE, seq_len=TEXT_SEQ_LEN))


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """Writes a checkpoint as training does; keywords go into its record, `extra` beside it."""

    def write(path: Path, model: nn.Module, *, extra: dict[str, object] | None = None, **record: object) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
            "global_step": 7,
            "dalle1": make_record(model, **record),  # type: ignore[arg-type]
        }
        torch.save(content | (extra or {}), path)
        return path

    return write


@pytest.fixture(scope="session")
def run_directory(
    tmp_path_factory: pytest.TempPathFactory,
    make_transformer: Callable[..., DalleTransformer],
    make_dvae: Callable[..., DVAE],
    make_clip: Callable[..., CLIP],
    text_tokenizer: TextTokenizer,
    write_checkpoint: Callable[..., Path],
) -> Path:
    """A directory with `runs/shapes/<stage>/checkpoints/last.ckpt` of all stages; tests must not change it."""
    root = tmp_path_factory.mktemp("trained")
    dvae = make_dvae()

    def path(stage: str) -> Path:
        return root / "runs" / "shapes" / stage / "checkpoints" / "last.ckpt"

    write_checkpoint(path("dvae"), dvae)
    write_checkpoint(path("clip"), make_clip(), text_tokenizer=text_tokenizer)
    dvae_sha256 = weights_sha256(dvae.state_dict())
    write_checkpoint(path("transformer"), make_transformer(), text_tokenizer=text_tokenizer, dvae_sha256=dvae_sha256)
    return root


@pytest.fixture(scope="session")
def checkpoints(run_directory: Path) -> dict[str, Path]:
    """The checkpoint of each stage in `run_directory`."""
    directory = run_directory / "runs" / "shapes"
    return {stage: directory / stage / "checkpoints" / "last.ckpt" for stage in ("transformer", "dvae", "clip")}
