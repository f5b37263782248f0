"""A released dVAE in the place of a trained one: the transformer learns its tokens, and samples become pictures."""

from __future__ import annotations

from pathlib import Path

import official_dvae
import pytest
import torch
from stage_runs import Train

from dalle1.checkpoint import load_image_tokenizer, load_transformer
from dalle1.convert import convert_openai_dvae
from dalle1.pipeline import Pipeline


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted dVAE for pictures of 16x16 pixels as 2x2 tokens of 16 codes."""
    directory = tmp_path_factory.mktemp("released")
    parts = official_dvae.make_official(official_dvae.Sizes(vocab=16, n_hid=4, n_init=4, groups=4, blocks=1))
    encoder, decoder = (official_dvae.save_official(part, directory / type(part).__name__) for part in parts)
    convert_openai_dvae(encoder, decoder, directory / "dvae")
    return directory / "dvae"


def test_transformer_is_trained_on_it_and_sampled(train: Train, trained: Path, tmp_path: Path, converted: Path) -> None:
    options = [f"dvae={converted}", f"text_tokenizer={trained}/tokenizer/tokenizer.json"]
    assert train(tmp_path, "transformer", *options, "grid_size=2", "optim.max_steps=2")["step"] == 2
    checkpoint = tmp_path / "transformer" / "checkpoints" / "last.ckpt"
    image_tokenizer = load_image_tokenizer(converted)
    assert load_transformer(checkpoint).dvae_sha256 == image_tokenizer.sha256
    pipeline = Pipeline.from_checkpoint(transformer=checkpoint, dvae=converted)
    result = pipeline(["a red circle"], candidates=3)[0]
    assert result.images.shape == (3, 3, 16, 16)
    torch.testing.assert_close(result.images, image_tokenizer.decode(result.image_tokens))
    with pytest.raises(ValueError, match="the transformer needs the dVAE it was trained with"):
        Pipeline.from_checkpoint(transformer=checkpoint, dvae=trained / "dvae" / "checkpoints" / "last.ckpt")


def test_sizes_that_do_not_fit_it_are_named(train: Train, trained: Path, tmp_path: Path, converted: Path) -> None:
    options = [f"dvae={converted}", f"text_tokenizer={trained}/tokenizer/tokenizer.json"]
    with pytest.raises(ValueError, match=r"the transformer's image_vocab_size must be 16, .* got 17"):
        train(tmp_path, "transformer", *options, "image_vocab_size=17")


def test_directory_that_is_no_checkpoint_is_refused(train: Train, trained: Path, tmp_path: Path) -> None:
    options = [f"dvae={trained}/dvae", f"text_tokenizer={trained}/tokenizer/tokenizer.json"]
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json; of a stage's results give the file"):
        train(tmp_path, "transformer", *options)
    assert not (tmp_path / "transformer").exists()
