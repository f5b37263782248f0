"""Stages from the real configuration at toy size: what they write."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from stage_runs import STAGES, Train, last, stop_at_step
from tokenizers import Tokenizer

from dalle1.checkpoint import load_clip, load_dvae, load_transformer, read_checkpoint, weights_sha256
from dalle1.data.shards import ShardIndex
from dalle1.evaluation.report import format_report, make_report


@pytest.mark.parametrize("stage", STAGES)
def test_stage_writes_all_it_promises(trained: Path, stage: str) -> None:
    names = {path.name for path in (trained / stage).iterdir()}
    assert {"checkpoints", "config.yaml", "curves.png", "logs", "summary.json"} <= names
    assert not list((trained / stage).rglob("*.partial"))
    summary = json.loads((trained / stage / "summary.json").read_text())
    assert summary["step"] == 8
    assert summary["bad_samples"] == 0
    assert summary["wall_seconds"] > 0


def test_pictures_are_drawn_after_every_validation(trained: Path) -> None:
    for stage, names in {"dvae": ("code_use", "reconstructions"), "transformer": ("samples",)}.items():
        found = {path.name for path in (trained / stage / "pictures").iterdir()}
        assert found == {f"{name}-step000000{step}.png" for name in names for step in (4, 8)}


def test_checkpoints_rebuild_their_models(trained: Path) -> None:
    dvae, clip, transformer = (
        load_dvae(last(trained, "dvae")),
        load_clip(last(trained, "clip")),
        load_transformer(last(trained, "transformer")),
    )
    assert transformer.dvae_sha256 == dvae.sha256
    assert clip.text_tokenizer is not None
    assert transformer.text_tokenizer is not None
    assert clip.text_tokenizer.sha256 == transformer.text_tokenizer.sha256
    assert transformer.model.config.grid_width == 4
    # Sampling uses the averaged weights, which differ from the last ones.
    raw = {
        name.removeprefix("model."): tensor
        for name, tensor in read_checkpoint(last(trained, "dvae"))["state_dict"].items()
    }
    assert weights_sha256(raw) != dvae.sha256


def test_run_that_fails_ends_its_weights_and_biases_run_as_failed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    codes: list[int | None] = []
    finish = wandb.Run.finish
    monkeypatch.setattr(
        wandb.Run, "finish", lambda run, exit_code=None: (codes.append(exit_code), finish(run, exit_code))
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_end", stop_at_step(6))
    with pytest.raises(SystemExit):
        train(tmp_path, "dvae", "logger=wandb")
    assert codes == [1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skipped_samples_are_counted_in_the_summary(
    train: Train, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    shard = tmp_path / "bad.tar"
    pictures = [("1.png", b""), ("2.png", b"broken"), ("3.txt", b"a caption")]
    with tarfile.open(shard, "w") as tar:
        for name, content in pictures:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    overrides = [f"data.train=[{shapes}/train-00000.tar,{shard}]", "data.on_bad_sample=skip", "data.augmentation=dvae"]
    overrides.append("data.cache_images=false")
    # 43 samples: 14 batches of 6 of them see all.
    steps = [
        "optim.max_steps=14",
        "optim.batch_size=6",
        "optim.codebook_start_step=0",
        f"data.num_workers={num_workers}",
    ]
    assert train(tmp_path, "dvae", *overrides, *steps)["bad_samples"] == 3
    assert caplog.messages[-1] == "3 of 51 samples skipped: picture cannot be decoded (2), no picture (1)"
    summary = train(tmp_path, "tokenizer", *overrides)
    assert summary["bad_samples"] == 2
    assert "2 of 43 samples skipped: no caption (2)" in caplog.messages


def test_network_ends_with_a_line_of_what_it_has_come_to(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        summary = train(tmp_path, "dvae", "optim.max_steps=2", "optim.codebook_start_step=0")
    place = re.escape(os.path.relpath(tmp_path / "dvae"))
    numbers = f"psnr_db {summary['psnr_db']:.4g}, codes_used_share {summary['codes_used_share']:.4g}"
    assert re.fullmatch(f"'{place}' is complete after 0:0[0-9]:[0-9]{{2}}: {numbers}", caplog.messages[-1])


def test_tokenizer_whose_summary_is_missing_gets_it_again(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "summary.json").unlink()
    before = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    train(tmp_path, "tokenizer")
    assert (tmp_path / "tokenizer" / "summary.json").is_file()
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_run_does_not_end_in_nan(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.training.run.train_tokenizer", lambda *given: {"tokens_per_caption": math.nan})
    with pytest.raises(ValueError, match=r"must end in finite numbers, got NaN or infinity for tokens_per_caption"):
        train(tmp_path, "tokenizer")
    assert not (tmp_path / "tokenizer" / "summary.json").exists()


def test_caption_too_long_is_an_error_or_cut_by_option(train: Train, tmp_path: Path) -> None:
    short = "text_seq_len=3"
    train(tmp_path, "tokenizer", short)
    with pytest.raises(ValueError, match=r"caption must have at most 3 tokens, got .*data.on_bad_sample=skip"):
        train(tmp_path, "clip", short)
    assert not (tmp_path / "clip").exists()


@pytest.mark.parametrize(("stage", "num_workers"), [("clip", 0), ("clip", 1), ("transformer", 0)])
def test_cut_captions_are_counted_in_the_summary(
    train: Train, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str, num_workers: int
) -> None:
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    short = ["text_seq_len=3", "truncate_captions=true", f"data.num_workers={num_workers}"]
    train(tmp_path, "tokenizer", *short)
    # 20 steps of 4 are two epochs of the 40 samples; 8 are for validation.
    summary = train(tmp_path, stage, *short, "optim.max_steps=20")
    assert (summary["cut_captions"], summary["bad_samples"]) == (48, 0)
    assert caplog.messages[-1] == "48 of the captions that were read had too many tokens and were cut"


def test_tokenizer_file_of_the_library_trains_the_later_stages(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    own = json.loads((trained / "tokenizer" / "tokenizer.json").read_text())["bpe"]
    bpe = Tokenizer.from_str(own)
    bpe.add_special_tokens(["<pad>"])
    bpe.save(str(tmp_path / "other.json"))
    options = [f"text_tokenizer={tmp_path / 'other.json'}", "text_vocab_size=301", "text_seq_len=50"]
    train(tmp_path, "clip", *options)
    train(tmp_path, "transformer", *options)
    for tokenizer in (
        load_clip(last(tmp_path, "clip")).text_tokenizer,
        load_transformer(last(tmp_path, "transformer")).text_tokenizer,
    ):
        assert tokenizer is not None
        assert (tokenizer.vocab_size, tokenizer.seq_len) == (301, 50)
        assert len(tokenizer.ids("<pad>")) > 1
    with pytest.raises(ValueError, match=r"text_vocab_size must be >= 301, .* got 300"):
        train(tmp_path / "smaller", "clip", *options, "text_vocab_size=300")


def test_bpe_dropout_trains_on_other_pieces(train: Train, trained: Path, tmp_path: Path) -> None:
    for stage in ("tokenizer", "dvae"):
        shutil.copytree(trained / stage, tmp_path / stage)
    dropped = json.loads((trained / "transformer" / "summary.json").read_text())
    whole = train(tmp_path, "transformer", "optim.bpe_dropout=0.0")
    assert whole["text_nats_per_token"] != dropped["text_nats_per_token"]
    with pytest.raises(ValueError, match=r"another optim.bpe_dropout \(0.0, not 0.1\)"):
        train(tmp_path, "transformer")


def test_tokenizer_stage_says_how_many_entries_the_captions_gave(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        summary = train(tmp_path, "tokenizer", "text_vocab_size=5000")
    assert summary["captions"] == 40
    assert 256 < summary["entries"] < 5000
    expected = f"40 captions gave {summary['entries']} of 5,000 entries; the others stay unused"
    assert caplog.messages[-1] == expected


def test_tokenizer_stage_stops_at_too_many_bad_captions(train: Train, tmp_path: Path, shapes: Path) -> None:
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w") as tar:
        for i in range(200):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = 3
            tar.addfile(member, io.BytesIO(b"png"))
    options = (f"data.train=[{bad},{shapes}/train-*.tar]", "data.on_bad_sample=skip")
    with pytest.raises(ValueError, match=r"at most 0\.1 of the samples that are read may be bad .*no caption"):
        train(tmp_path, "tokenizer", *options)
    assert not (tmp_path / "tokenizer" / "tokenizer.json").exists()
    assert train(tmp_path, "tokenizer", *options, "data.max_bad_fraction=1")["captions"] == 40
    for other in ("data.train=other-*.tar", "data.caption=lines", "filters.min_caption_words=2"):
        with pytest.raises(ValueError, match=r"tokenizer\.json' has another (data\.train|data\.caption|filters); del"):
            train(tmp_path, "tokenizer", *options, other)


def test_tokenizer_needs_a_caption(train: Train, tmp_path: Path) -> None:
    options = ("data.caption=json:nothing", "data.on_bad_sample=skip")
    with pytest.raises(ValueError, match=r"at most 0\.1 of the samples .* got 40 of 80"):
        train(tmp_path, "tokenizer", *options)
    with pytest.raises(ValueError, match=r"data\.train must have at least one good caption, got none"):
        train(tmp_path, "tokenizer", *options, "data.max_bad_fraction=1")


def test_transformer_trains_in_bf16(train: Train, trained: Path, tmp_path: Path) -> None:
    for stage in ("tokenizer", "dvae"):
        shutil.copytree(trained / stage, tmp_path / stage)
    summary = train(tmp_path, "transformer", "trainer.precision=bf16-mixed")
    precise = json.loads((trained / "transformer" / "summary.json").read_text())
    for name in ("text_nats_per_token", "image_nats_per_token"):
        assert summary[name] != precise[name]
        assert summary[name] == pytest.approx(precise[name], rel=0.01)
    weights = read_checkpoint(last(tmp_path, "transformer"))["state_dict"].values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}


def test_progress_bar_can_be_left_out(train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "dvae", "trainer.enable_progress_bar=false")["step"] == 8
    assert "step/s" not in capfd.readouterr().err


def test_memorises_one_batch(train: Train, tmp_path: Path) -> None:
    # All 40 scenes in every batch.
    quick = ["optim.batch_size=40", "optim.max_steps=200", "trainer.val_check_interval=200", "optim.lr=0.01"]
    quick += ["callbacks.checkpoint.every_n_steps=200"]
    train(tmp_path, "tokenizer")
    train(tmp_path, "dvae", *quick, "optim.codebook_start_step=20")
    train(tmp_path, "transformer", *quick, "model.d_model=32")
    logged = (tmp_path / "transformer" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = logged[0].split(",").index("train/image_nats_per_token")
    losses = [float(row.split(",")[column]) for row in logged[1:] if row.split(",")[column]]
    assert losses[0] > 2.0  # ln 16 = 2.77 for a guess
    assert losses[-1] < 0.1


def test_report_has_the_promised_keys(trained: Path, shapes: Path) -> None:
    prompts = list(dict.fromkeys(sample.text() for sample in ShardIndex(f"{shapes}/test-*.tar")))[:4]
    report = make_report(trained, prompts, candidates=16, temperature=1.0, guidance_scale=None, seed=0)
    for key in ("wall_seconds", "psnr_db", "text_nats_per_token", "image_nats_per_token"):
        assert isinstance(report[key], float)
    for key in ("codes_used_share", "prompt_accuracy_single", "prompt_accuracy_best_of_16"):
        assert 0 <= report[key] <= 1
    assert all(Path(grid).is_file() for grid in report["grids"])
    table = format_report(report)
    assert "whole prompt" in table
    assert "best of 16 by CLIP" in table
    json.dumps(report)


def test_earlier_run_is_not_gone_on_with_if_that_is_asked_for(train: Train, trained: Path) -> None:
    before = sorted((trained / "dvae").rglob("*"))
    with pytest.raises(ValueError, match=r"dvae' must be empty with resume=never, it holds an earlier run"):
        train(trained, "dvae", "resume=never")
    with pytest.raises(ValueError, match="resume must be auto or never, got yes"):
        train(trained, "dvae", "resume='yes'")
    assert sorted((trained / "dvae").rglob("*")) == before
