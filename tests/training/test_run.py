"""Stages from the real configuration at toy size: what they write, resuming, and what they refuse."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from dalle1.checkpoint import load_clip, load_dvae, load_transformer, read_checkpoint, weights_sha256
from dalle1.data.shards import ShardIndex
from dalle1.evaluation.report import format_report, make_report

Train = Callable[..., dict[str, Any]]
STAGES = ("dvae", "clip", "transformer")


def last(results: Path, stage: str) -> Path:
    return results / stage / "checkpoints" / "last.ckpt"


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


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_equals_uninterrupted_one_bit_for_bit(
    train: Train, trained: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for earlier in ("tokenizer", "dvae"):
        if earlier != stage:
            shutil.copytree(trained / earlier, tmp_path / earlier)
    save, saved = torch.save, []

    def stop_after_first(content: object, file: object) -> None:
        save(content, file)
        saved.append(content)
        if len(saved) == 1:
            raise KeyboardInterrupt

    # The process dies right after the checkpoint of step 4, before its file has its name.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop_after_first)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            train(tmp_path, stage)
    assert not last(tmp_path, stage).exists()
    with monkeypatch.context() as patch:
        patch.setattr("dalle1.training.callbacks.LastCheckpoint.on_train_batch_end", stop_at_step(6))
        with pytest.raises(SystemExit):
            train(tmp_path, stage)
    assert read_checkpoint(last(tmp_path, stage))["global_step"] == 4

    summary = train(tmp_path, stage)

    assert timeless(summary) == timeless(json.loads((trained / stage / "summary.json").read_text()))
    whole, resumed = read_checkpoint(last(trained, stage)), read_checkpoint(last(tmp_path, stage))
    assert resumed["global_step"] == whole["global_step"] == 8
    for part in ("state_dict", "ema"):
        assert weights_sha256(resumed[part]) == weights_sha256(whole[part])
    for mine, other in zip(resumed["optimizer_states"], whole["optimizer_states"], strict=True):
        for name, state in other["state"].items():
            assert torch.equal(mine["state"][name]["exp_avg_sq"], state["exp_avg_sq"])


def test_resumed_run_with_scaled_resblocks_equals_uninterrupted_one(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("whole", "resumed"):
        for earlier in ("tokenizer", "dvae"):
            shutil.copytree(trained / earlier, tmp_path / run / earlier)
    train(tmp_path / "whole", "transformer", "optim.resblock_gradient_scaling=true")
    with monkeypatch.context() as patch:
        patch.setattr("dalle1.training.callbacks.LastCheckpoint.on_train_batch_end", stop_at_step(6))
        with pytest.raises(SystemExit):
            train(tmp_path / "resumed", "transformer", "optim.resblock_gradient_scaling=true")
    train(tmp_path / "resumed", "transformer", "optim.resblock_gradient_scaling=true")
    whole, resumed = (
        read_checkpoint(last(tmp_path / run, "transformer"))["state_dict"] for run in ("whole", "resumed")
    )
    assert weights_sha256(resumed) == weights_sha256(whole)
    # Two resblocks in each of three layers, grown eight times.
    assert whole["scaling.scales"].tolist() == pytest.approx(6 * [2 ** (13 + 8 / 1000)])
    logged = (tmp_path / "whole" / "transformer" / "logs" / "version_0" / "metrics.csv").read_text()
    for name in ("resblock_scale_min", "resblock_scale_max", "skipped_updates"):
        assert f"train/{name}" in logged
    assert load_transformer(last(tmp_path / "whole", "transformer")).step == 8


def test_scaled_resblocks_need_fp32_around_them(train: Train, trained: Path, tmp_path: Path) -> None:
    for earlier in ("tokenizer", "dvae"):
        shutil.copytree(trained / earlier, tmp_path / earlier)
    with pytest.raises(ValueError, match=r"must be 32-true with optim.resblock_gradient_scaling.*got bf16-mixed"):
        train(tmp_path, "transformer", "optim.resblock_gradient_scaling=true", "trainer.precision=bf16-mixed")


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "wall_seconds"}


def stop_at_step(step: int) -> Callable[..., None]:
    """The checkpoint callback's own work, and then a dead process after update `step`."""
    from dalle1.training.callbacks import LastCheckpoint

    work = LastCheckpoint.on_train_batch_end

    def on_train_batch_end(self: Any, trainer: Any, *rest: Any) -> None:
        work(self, trainer, *rest)
        if trainer.global_step == step:
            raise SystemExit(1)

    return on_train_batch_end


def test_weights_and_biases_log_offline_and_end_with_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train(tmp_path, "dvae", "logger=wandb")["step"] == 8
    assert wandb.run is None, "the next job of a sweep would log into it"
    assert list((tmp_path / "dvae" / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "dvae" / "wandb_id").read_text()


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
    monkeypatch.setattr("dalle1.training.callbacks.LastCheckpoint.on_train_batch_end", stop_at_step(6))
    with pytest.raises(SystemExit):
        train(tmp_path, "dvae", "logger=wandb")
    assert codes == [1]


def test_wrong_trainer_leaves_no_weights_and_biases_files(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(Exception, match="Precision 17 is invalid"):
        train(tmp_path, "dvae", "logger=wandb", "trainer.precision=17")
    assert not (tmp_path / "dvae").exists()


@pytest.mark.parametrize("moment", ["on_train_batch_start", "on_validation_batch_start"])
def test_ctrl_c_is_not_an_error_of_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    def press(self: object, trainer: Any, *_: object) -> None:
        # In validation: of the last step, after training.
        if moment == "on_train_batch_start" or trainer.state.fn == "validate":
            raise KeyboardInterrupt

    monkeypatch.setattr(f"dalle1.training.callbacks.LastCheckpoint.{moment}", press)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "dvae")
    assert capsys.readouterr().err.endswith("\n"), "what is printed next begins a line"


def test_wall_time_of_earlier_starts_counts(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    content = read_checkpoint(last(tmp_path, "dvae"))
    assert 0 < content["wall_seconds"] < 1000
    torch.save(content | {"wall_seconds": 5000.0}, last(tmp_path, "dvae"))
    assert train(tmp_path, "dvae", "optim.max_steps=9")["wall_seconds"] > 5000


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
    # 43 samples: an epoch is 7 batches of 6 of them, so two epochs of 14 see all.
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


def test_finished_stage_is_left_alone(train: Train, trained: Path) -> None:
    before = last(trained, "dvae").stat().st_mtime_ns
    summary = (trained / "dvae" / "summary.json").read_text()
    assert train(trained, "dvae") == json.loads(summary)
    assert last(trained, "dvae").stat().st_mtime_ns == before
    assert (trained / "dvae" / "summary.json").read_text() == summary


def test_run_goes_on_when_more_steps_are_asked_for(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    assert train(tmp_path, "dvae", "optim.max_steps=10")["step"] == 10


def test_run_of_another_model_is_refused(train: Train, trained: Path) -> None:
    with pytest.raises(ValueError, match="was trained with another model_config; delete that run, or choose another"):
        train(trained, "dvae", "model.n_hid=32", "model.n_init=32")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1e-4", r"another optim.lr \(0.003, not 0.0001\)"),
        ("optim.kl_weight=9", r"another optim.kl_weight \(.*, not 9\)"),
        ("data.seed=5", r"another data.seed \(0, not 5\)"),
        ("data.augmentation=dvae", r"another data.augmentation \(none, not dvae\)"),
        ("data.background=red", r"another data.background \(white, not red\)"),
        ("data.small_pictures=refuse", r"another data.small_pictures \(enlarge, not refuse\)"),
        ("data.train=elsewhere/mine-*.tar", r"another data.train \(\['train-\*.tar'\], not \['mine-\*.tar'\]\)"),
    ],
)
def test_run_with_other_options_is_refused(train: Train, trained: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(trained, "dvae", override)


def test_gradient_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dalle1.training import dvae_module

    nll = dvae_module.logit_laplace_nll

    def diverge(*args: Any, **options: Any) -> torch.Tensor:
        calls.extend([1] * torch.is_grad_enabled())  # not those of validation
        return nll(*args, **options) * (float("nan") if len(calls) == 6 else 1)

    calls: list[int] = []
    monkeypatch.setattr(dvae_module, "logit_laplace_nll", diverge)
    with pytest.raises(ValueError, match=r"gradient must stay finite, got norm nan at step 5; set a lower"):
        train(tmp_path, "dvae")
    content = read_checkpoint(last(tmp_path, "dvae"))
    assert content["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())


def test_tokenizer_whose_summary_is_missing_gets_it_again(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "summary.json").unlink()
    before = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    train(tmp_path, "tokenizer")
    assert (tmp_path / "tokenizer" / "summary.json").is_file()
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == before


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
        ("text_seq_len=63", "text_seq_len must be 64, .*got 63; set model.text_seq_len=64"),
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
    assert caplog.messages[-1] == "48 of 48 captions had too many tokens and were cut"


def test_count_of_cut_captions_survives_a_resume(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["text_seq_len=3", "truncate_captions=true"]
    train(tmp_path, "tokenizer", *short)
    monkeypatch.setattr("dalle1.training.callbacks.LastCheckpoint.on_train_batch_end", stop_at_step(6))
    with pytest.raises(SystemExit):
        train(tmp_path, "clip", *short)
    # The first 4 steps are in the checkpoint, 4 more follow: 32 of the 40 training samples.
    monkeypatch.undo()
    assert train(tmp_path, "clip", *short)["cut_captions"] == 32 + 8


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
    prompts = list(dict.fromkeys(ShardIndex(f"{shapes}/test-*.tar").captions()))[:4]
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


def test_bad_picture_leaves_no_new_run_behind(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, trainer: Any, *_: object) -> None:
        raise ValueError("picture of sample '17' cannot be decoded")

    monkeypatch.setattr("dalle1.training.callbacks.LastCheckpoint.on_train_batch_start", refuse)
    with pytest.raises(ValueError, match="cannot be decoded"):
        train(tmp_path, "dvae")
    assert not (tmp_path / "dvae").exists()
