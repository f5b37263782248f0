"""What stages refuse, in one sentence and with nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import Train, last


def test_scaled_resblocks_need_fp32_around_them(train: Train, trained: Path, tmp_path: Path) -> None:
    for earlier in ("tokenizer", "dvae"):
        shutil.copytree(trained / earlier, tmp_path / earlier)
    with pytest.raises(ValueError, match=r"must be 32-true with optim.resblock_gradient_scaling.*got bf16-mixed"):
        train(tmp_path, "transformer", "optim.resblock_gradient_scaling=true", "trainer.precision=bf16-mixed")


@pytest.mark.parametrize("value", ["no", "maybe", "0"])
def test_cutting_captions_is_true_or_false(train: Train, trained: Path, tmp_path: Path, value: str) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=f"truncate_captions must be true or false, got '?{value}"):
        train(tmp_path, "clip", f"truncate_captions={value}")


def test_damaged_tokenizer_is_one_sentence(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bpe": "{}"}))
    with pytest.raises(ValueError, match="is not a text tokenizer of stage=tokenizer"):
        train(tmp_path, "clip")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.accelerator=gpu", "trainer options must fit this machine"),
        ("trainer.precision=16-mixed", "trainer.precision must be .*bf16-mixed.*got 16-mixed"),
        ("trainer.precision=bf16-true", "trainer.precision must be .*bf16-mixed.*got bf16-true"),
        ("trainer.precision=17", "Precision 17 is invalid"),
        ("trainer.val_check_interval=0", "val_check_interval must be >= 1 update, got 0"),
        ("grid_size=7", r"image_size must be grid_size times the dVAE's downsampling, 7 \* \d+, got \d+"),
        ("optim.codebook_start_step=8", "codebook_start_step must be < max_steps = 8, got 8"),
        (
            "optim.codebook_start_pictures=1 model.vocab_size=17",
            "as many grid positions as codes, 17, got 16 of 1 pictures; raise optim.codebook_start_pictures",
        ),
    ],
)
def test_options_that_cannot_work_get_one_sentence(train: Train, tmp_path: Path, override: str, message: str) -> None:
    if override == "trainer.accelerator=gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(Exception, match=message):
        train(tmp_path, "dvae", *override.split())


def test_tokenizer_of_another_size_is_refused(train: Train, trained: Path) -> None:
    with pytest.raises(ValueError, match=r"has vocab_size 300, not 400; delete it or choose another name="):
        train(trained, "tokenizer", "text_vocab_size=400")
    with pytest.raises(ValueError, match=r"has pretokenizer gpt2, not paper; delete it"):
        train(trained, "tokenizer", "model.pretokenizer=paper")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("clip", "no text tokenizer at .*; run 'python train.py stage=tokenizer' first"),
        ("transformer", "no text tokenizer at .*; run 'python train.py stage=tokenizer' first"),
    ],
)
def test_missing_tokenizer_names_the_stage_to_run(train: Train, tmp_path: Path, stage: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        train(tmp_path, stage)
    assert not (tmp_path / stage).exists()


def test_missing_dvae_names_the_stage_to_run(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"needs a trained dVAE.*run 'python train.py stage=dvae' first"):
        train(tmp_path, "transformer")
    assert not (tmp_path / "transformer").exists()


def test_other_checkpoint_than_a_dvae_is_refused(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="must hold a dvae, got a clip"):
        train(tmp_path, "transformer", f"dvae={last(trained, 'clip')}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image_vocab_size=17", "image_vocab_size must be 16, as its tokenizers and data have it, got 17"),
        ("text_seq_len=63", "text_seq_len must be 64, .*got 63; set text_seq_len=64"),
        ("grid_size=3", "grid_height must be 4, .*got 3"),
        ("image_size=18", "image_size must be a multiple of 4, the dVAE's downsampling, got 18"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    train: Train, trained: Path, tmp_path: Path, override: str, message: str
) -> None:
    for stage in ("tokenizer", "dvae"):
        shutil.copytree(trained / stage, tmp_path / stage)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, "transformer", override)
    assert not (tmp_path / "transformer").exists()


def test_wrong_trainer_leaves_no_weights_and_biases_files(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(Exception, match="Precision 17 is invalid"):
        train(tmp_path, "dvae", "logger=wandb", "trainer.precision=17")
    assert not (tmp_path / "dvae").exists()


def test_bad_picture_leaves_no_new_run_behind(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, trainer: Any, *_: object) -> None:
        raise ValueError("picture of sample '17' cannot be decoded")

    monkeypatch.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_start", refuse)
    with pytest.raises(ValueError, match="cannot be decoded"):
        train(tmp_path, "dvae")
    assert not (tmp_path / "dvae").exists()
