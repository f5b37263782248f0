"""One stage of training from its configuration: what `train.py stage=...` does.

Every stage reads the results of earlier ones in `results_dir` and writes its own into `run_dir`:
`checkpoints/last.ckpt`, `summary.json`, `config.yaml`, logs and pictures; the tokenizer stage `tokenizer.json` and
`summary.json`, the tokens stage shards of image tokens.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from dalle1.atomic_files import atomic, remove_partial, write_json
from dalle1.checkpoint import OPTIONS_KEY, RECORD_KEY, load_image_tokenizer
from dalle1.data.config import DataConfig
from dalle1.data.datamodule import PairDataModule
from dalle1.evaluation.pictures import save_curves
from dalle1.models.clip import CLIP, CLIPConfig
from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.run_status import STATUS, read_status
from dalle1.tokenizers.caption_encoder import CaptionEncoder
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig
from dalle1.tokenizers.text_file import load_text_tokenizer
from dalle1.training.allocator import keep_freed_memory
from dalle1.training.bad_updates import LOG as BAD_UPDATES
from dalle1.training.bad_updates import BadUpdates, ReturnToCheckpointError
from dalle1.training.best_checkpoint import BestCheckpoint
from dalle1.training.checkpoints import LAST, LastCheckpoint, newest_whole
from dalle1.training.clip_module import CLIPModule
from dalle1.training.data_report import report_findings
from dalle1.training.disk_full import save_or_fail
from dalle1.training.dvae_module import DVAEModule, DVAEOptimConfig
from dalle1.training.logging import begin_wandb_run, finish_wandb_run, say_result, wandb_run_ends
from dalle1.training.optim import OptimConfig
from dalle1.training.ranks import Agreement, check_number, finish_ranks
from dalle1.training.run_lock import locked
from dalle1.training.sharding import FullyShardedStrategy
from dalle1.training.stage_module import StageModule
from dalle1.training.stop_signals import RunStoppedError, StopSignals
from dalle1.training.tensorboard import TensorBoard
from dalle1.training.tokenizer_stage import train_tokenizer
from dalle1.training.tokens_stage import TokensConfig, build_fabric, encode_data
from dalle1.training.trainer import build_trainer, ctrl_c_stays_itself
from dalle1.training.transformer_module import ComputeConfig, TransformerModule, TransformerOptimConfig

logger = logging.getLogger(__name__)

# Options of the optimizer that a run may be continued with other values of.
_MAY_CHANGE = ("max_steps", "batch_size")
# Options of the data that it must be continued with; the loader sees to those that decide the order.
_SAME_DATA = ("image_size", "seed", "augmentation", "background", "small_pictures", "caption")

CHECKPOINT = Path("checkpoints") / LAST
TOKENIZER = Path("tokenizer.json")
SUMMARY = Path("summary.json")
T = TypeVar("T")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train the stage that `cfg` describes, or continue it, and return its summary.

    Raises: ValueError, TypeError or FileNotFoundError, each in one sentence, for anything that a user can cause;
        SystemExit with code 0 if a signal has stopped training, so that no sweep goes on either.
    """
    run_dir = Path(cfg.run_dir)
    is_new = not run_dir.exists() or not any(run_dir.iterdir())
    _check_resume(cfg.resume, run_dir, is_new=is_new)
    try:
        while True:
            try:
                with wandb_run_ends():
                    return _run_stage(cfg, run_dir)
            except ReturnToCheckpointError:  # a line has said so
                pass
            # As a new process would. What is left of the network before must make room first.
            gc.collect()
    except (ValueError, TypeError, OSError):
        # Bad input, such as a picture that cannot be decoded: there is nothing to go on from, and nothing to see.
        if is_new and not _has_begun(run_dir):
            rank_zero_only(shutil.rmtree)(run_dir, ignore_errors=True)
        raise
    except RunStoppedError as stop:
        rank_zero_only(logger.info)(str(stop))
        raise SystemExit(0) from None
    finally:
        _remove_if_empty(run_dir)


def _has_begun(run_dir: Path) -> bool:
    """Whether there are shards of tokens, a bad update, or an update that was made."""
    if any(run_dir.glob("*.tar")) or (run_dir / BAD_UPDATES).exists():
        return True
    return (run_dir / STATUS).exists() and read_status(run_dir / STATUS).step > 0


def _check_resume(resume: object, run_dir: Path, *, is_new: bool) -> None:
    if resume not in ("auto", "never"):
        raise ValueError(f"resume must be auto or never, got {resume}; another name= begins anew")
    # The first process alone: it has begun to write when it starts the others.
    if resume == "never" and not is_new and getattr(rank_zero_only, "rank", 0) == 0:
        raise ValueError(
            f"'{os.path.relpath(run_dir)}' must be empty with resume=never, it holds an earlier run; choose another "
            "name=, or resume=auto to go on with it"
        )


def _run_stage(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Prepare data, seed, train or continue, write the summary."""
    stage = str(cfg.stage.name)
    started = time.monotonic()
    # A sharp softmax makes numbers so small that CPUs handle them in microcode: up to 20 times slower steps in the
    # relaxation. Before anything starts threads, which inherit the setting.
    torch.set_flush_denormal(True)
    data = PairDataModule(build(cfg, "data", DataConfig))
    pl.seed_everything(cfg.seed, verbose=False)
    earlier_seconds = 0.0
    metrics: dict[str, Any] | None
    if data.config.tokens is not None and stage != "transformer":
        raise ValueError(f"data.tokens are for stage=transformer, which alone needs no pictures, got stage={stage}")
    if stage == "tokenizer":
        is_complete = (run_dir / TOKENIZER).exists() and (run_dir / SUMMARY).exists()
        earlier = _read_json(run_dir / SUMMARY) if is_complete else {}
        given = train_tokenizer(build(cfg, "model", TextTokenizerConfig), data, run_dir / TOKENIZER, earlier)
        metrics = None if is_complete else given
    elif stage == "tokens":
        metrics = _encode_pictures(cfg, data, run_dir)
        if metrics == {}:  # the first device has it all
            return {}
    else:
        module = _MODULES[stage](cfg)
        with locked(run_dir):
            metrics = _train_network(cfg, data, module, run_dir)
        earlier_seconds = module.earlier_seconds
    if metrics is None:
        rank_zero_only(logger.info)(
            "'%s' is complete; nothing to do (another name= starts anew)", os.path.relpath(run_dir)
        )
        return _read_json(run_dir / SUMMARY)
    seconds = earlier_seconds + time.monotonic() - started
    summary = {"stage": stage, "wall_seconds": round(seconds, 1), **metrics}
    _check_finite(summary)
    rank_zero_only(write_json)(run_dir / SUMMARY, summary)
    rank_zero_only(finish_wandb_run)(summary)
    rank_zero_only(say_result)(run_dir, summary)
    return summary


def _remove_if_empty(run_dir: Path) -> None:
    """Remove what Hydra made for a run that never began: its directory, and parents in the working directory."""
    here = Path.cwd()
    for directory in (run_dir, *(parent for parent in run_dir.absolute().parents if here in parent.parents)):
        try:
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # not empty
            return


def build(cfg: DictConfig, group: str, expected: type[T]) -> T:
    """The object that one group of the configuration describes.

    Raises: ValueError if the group is missing or describes something else than the stage needs.
    """
    node = cfg.get(group)
    built = instantiate(node, _convert_="all") if node else None
    if not isinstance(built, expected):
        got = f"a {type(built).__name__}" if built is not None else "none"
        raise ValueError(
            f"stage={cfg.stage.name} needs a {expected.__name__}, got {got}; "
            f"choose another {group}= (train.py stage={cfg.stage.name} --help lists them)"
        )
    return built


def _encode_pictures(cfg: DictConfig, data: PairDataModule, run_dir: Path) -> dict[str, Any] | None:
    """Write the image tokens of all pictures and return what there is to tell; None if an earlier run did."""
    for split in ("train", "val"):
        if data.config.is_stream(split):
            raise ValueError(f"stage=tokens needs shards on this machine, got data.{split} elsewhere; copy them here")
    config = TokensConfig(crops=cfg.stage.crops, batch_size=cfg.stage.batch_size)
    image_tokenizer = _load_dvae(Path(cfg.dvae), "tokens")
    data.prepare_data()
    data.setup("fit")
    is_complete = (run_dir / SUMMARY).exists()
    if not is_complete:
        run_dir.mkdir(parents=True, exist_ok=True)
    result = encode_data(
        data, image_tokenizer, config, run_dir, build_fabric(instantiate(cfg.trainer, _convert_="all"))
    )
    if is_complete and result.get("pictures_per_second", 0) is None:
        return None
    if result:
        logger.info("use them with: python train.py stage=transformer data.tokens=%s", os.path.relpath(run_dir))
    return result


def _text_tokenizer(cfg: DictConfig) -> TextTokenizer:
    return load_text_tokenizer(Path(cfg.text_tokenizer), vocab_size=cfg.text_vocab_size, seq_len=cfg.text_seq_len)


def _dvae_module(cfg: DictConfig) -> DVAEModule:
    model, optim = build(cfg, "model", DVAEConfig), build(cfg, "optim", DVAEOptimConfig)
    if cfg.data.image_size != cfg.grid_size * model.downsampling:
        raise ValueError(
            f"image_size must be grid_size times the dVAE's downsampling, {cfg.grid_size} * {model.downsampling}, got "
            f"{cfg.data.image_size}; set image_size=, grid_size= or the model's sizes"
        )
    return DVAEModule(DVAE(model), optim, seed=cfg.seed)


def _clip_module(cfg: DictConfig) -> CLIPModule:
    model, optim = build(cfg, "model", CLIPConfig), build(cfg, "optim", OptimConfig)
    tokenizer = _text_tokenizer(cfg)
    check_sizes("CLIP", model, text_vocab_size=tokenizer.vocab_size, text_seq_len=tokenizer.seq_len)
    return CLIPModule(CLIP(model), optim, seed=cfg.seed, text_tokenizer=tokenizer)


def _transformer_module(cfg: DictConfig) -> TransformerModule:
    model, optim = build(cfg, "model", TransformerConfig), build(cfg, "optim", TransformerOptimConfig)
    compute = build(cfg, "compute", ComputeConfig)
    text_tokenizer = _text_tokenizer(cfg)
    image_tokenizer = _load_dvae(Path(cfg.dvae), "transformer")
    grid = image_tokenizer.grid_size(cfg.data.image_size)
    check_sizes(
        "transformer",
        model,
        text_vocab_size=text_tokenizer.vocab_size,
        text_seq_len=text_tokenizer.seq_len,
        image_vocab_size=image_tokenizer.vocab_size,
        grid_height=grid,
        grid_width=grid,
    )
    # Sharded, all devices get the first one's weights: no other needs memory for the whole.
    is_needed = not _is_sharded(cfg) or rank_zero_only(lambda: True)()
    with nullcontext() if is_needed else torch.device("meta"):
        network = DalleTransformer(model)
    return TransformerModule(
        network,
        optim,
        seed=cfg.seed,
        image_tokenizer=image_tokenizer,
        text_tokenizer=text_tokenizer,
        compute=compute,
    )


def _is_sharded(cfg: DictConfig) -> bool:
    strategy = cfg.trainer.get("strategy")
    return isinstance(strategy, DictConfig) and strategy["_target_"].rpartition(".")[2] == FullyShardedStrategy.__name__


_MODULES: dict[str, Callable[[DictConfig], StageModule]] = {
    "dvae": _dvae_module,
    "clip": _clip_module,
    "transformer": _transformer_module,
}


def check_sizes(name: str, config: object, **needed: int) -> None:
    """Raise ValueError unless a model's sizes are those that its tokenizers and its data need."""
    for field, value in needed.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"the {name}'s {field} must be {value}, as its tokenizers and data have it, "
                f"got {getattr(config, field)}; set {'grid_size' if field.startswith('grid_') else field}={value}"
            )


def _load_dvae(path: Path, stage: str) -> ImageTokenizer:
    if not path.exists():
        raise FileNotFoundError(
            f"stage={stage} needs a trained dVAE, there is none at '{path}'; "
            "run 'python train.py stage=dvae' first, with this name= and experiment=, or give dvae=PATH"
        )
    return load_image_tokenizer(path)


def _train_network(cfg: DictConfig, data: PairDataModule, module: StageModule, run_dir: Path) -> dict[str, Any] | None:
    """Train to the last step and return the validation metrics; None if an earlier run did."""
    check_number(cfg.trainer.get("devices"), cfg.trainer.get("num_nodes", 1))
    if module.text_tokenizer is not None:
        if type(cfg.truncate_captions) is not bool:
            raise ValueError(f"truncate_captions must be true or false, got {cfg.truncate_captions!r}")
        dropout = module.optim.bpe_dropout if isinstance(module, TransformerModule) else 0.0
        data.encode_text = CaptionEncoder(module.text_tokenizer, truncate=cfg.truncate_captions, bpe_dropout=dropout)
    module.options = _options_of(module, data)
    start, step = _find_start(run_dir, module)
    if step >= module.optim.max_steps and (run_dir / SUMMARY).exists():
        return None
    # All input is checked before the first file is written.
    data.prepare_data()
    data.setup("fit")
    stopper = StopSignals()
    found = "none" if start is None else f"{start.name} of update {step}"
    trainer = build_trainer(cfg, module, run_dir, [Agreement(cfg, found), stopper])
    if start is not None:
        rank_zero_only(logger.info)("continuing '%s' from step %d", os.path.relpath(run_dir), step)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    if trainer.is_global_zero:
        _begin(cfg, trainer, run_dir, step)
    with ctrl_c_stays_itself(), stopper, suppress(RunStoppedError):
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        savers = [each for each in trainer.callbacks if isinstance(each, LastCheckpoint)]  # type: ignore[attr-defined]
        if all(each.last_saved != trainer.global_step for each in savers):
            # Training was made to end early, nothing was left to train, or the disk was full.
            save_or_fail(trainer, run_dir / CHECKPOINT)
        if stopper.received is None:
            # What Lightning logs a validation under; of a run that goes on after its last update it is one less.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
    if stopper.received is not None:
        finish_ranks(trainer)
        raise RunStoppedError(
            f"{stopper.received} has stopped '{os.path.relpath(run_dir)}' after update {trainer.global_step}, "
            "which is saved; the same command goes on"
        )
    if trainer.is_global_zero:
        save_curves(run_dir, run_dir / "curves.png")
    summary = {
        "step": trainer.global_step,
        **report_findings(data),
        **{name.replace("val/", ""): value for name, value in metrics.items()},
    }
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        summary |= each.summary if isinstance(each, BestCheckpoint | BadUpdates) else {}
    finish_ranks(trainer)
    return summary | ({"alarm": module.alarm} if module.alarm else {})


def _options_of(module: StageModule, data: PairDataModule) -> dict[str, Any]:
    """What a run that goes on as this one must have in common with it.

    Raises: ValueError if the data do not fit the network, or what it does with them.
    """
    optim = asdict(module.optim)
    of_data: dict[str, Any] = {name: getattr(data.config, name) for name in _SAME_DATA}
    of_data |= {"train": data.config.source_names, "filters": data.config.filters.to_dict()}
    if data.tokens is not None and isinstance(module, TransformerModule):
        data.check_dvae(module.image_tokenizer.sha256)
        # What was decided when the tokens were made, whatever the options say now.
        decided = asdict(data.tokens)
        names = [name for name in of_data if name in decided and name not in ("seed", "caption")]
        of_data |= {name: decided[name] for name in (*names, "crops", "samples_sha256")}
    elif isinstance(module, TransformerModule) and module.optim.cache_image_tokens:
        _check_tokens_can_be_cached(data.config)
    return {"optim": {name: value for name, value in optim.items() if name not in _MAY_CHANGE}, "data": of_data}


def _find_start(run_dir: Path, module: StageModule) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its update; none and 0 if there is none.

    Raises: as `newest_whole`; ValueError if it is of another run, or beyond the last update of this one.
    """
    found = newest_whole((run_dir / CHECKPOINT).parent)
    if found is None:
        return None, 0
    step = _check_same_run(*found, module)
    if step > module.optim.max_steps:
        raise ValueError(
            f"optim.max_steps must be at least {step}, where '{os.path.relpath(run_dir)}' was interrupted, got "
            f"{module.optim.max_steps}; leave it as it was, or choose another name="
        )
    return found[0], step


def _check_finite(summary: Mapping[str, Any]) -> None:
    bad = [name for name, value in summary.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"a run must end in finite numbers, got NaN or infinity for {', '.join(bad)}; if it has "
            "checkpoints they are kept, and a lower optim.lr under another name may end well"
        )


def _begin(cfg: DictConfig, trainer: pl.Trainer, run_dir: Path, step: int) -> None:
    """Make the run's directory ready, from the first device; training goes on after update `step`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_partial(run_dir)  # over a month of kills they would fill the disk
    (run_dir / SUMMARY).unlink(missing_ok=True)  # of a run that is made longer: it says that a run is complete
    with atomic(run_dir / "config.yaml") as temporary:
        OmegaConf.save(cfg, temporary, resolve=True)
    for each in trainer.loggers:
        if isinstance(each, WandbLogger):
            begin_wandb_run(each, run_dir, cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True)))
        elif isinstance(each, TensorBoard):
            each.begin(step)


def _check_tokens_can_be_cached(config: DataConfig) -> None:
    """Raise ValueError where a picture is another one each time, or has no number."""
    if config.augmentation != "none" or config.is_stream("train"):
        raise ValueError(
            "optim.cache_image_tokens must be false where a picture is another one each time or has no number, got "
            f"true with data.augmentation={config.augmentation}; set it to false, or use stage=tokens"
        )


def _check_same_run(checkpoint: Path, content: dict[str, Any], module: StageModule) -> int:
    """Step of an earlier run's checkpoint. Raises: ValueError if this run would train something else."""
    saved, wanted = content[RECORD_KEY], module.record
    if saved["kind"] != wanted["kind"]:
        raise ValueError(f"'{checkpoint}' must hold a {wanted['kind']}, got a {saved['kind']}; choose another name=")
    changed = [name for name in wanted if saved.get(name) != wanted[name] and name != "model_config"]
    groups = [("model", wanted["model_config"], saved["model_config"])]
    groups += [(group, now, content.get(OPTIONS_KEY, {}).get(group, {})) for group, now in module.options.items()]
    for group, now, before in groups:
        differing = [name for name in now if before.get(name) != now[name]]
        changed += [f"{group}.{name} ({_differing(before.get(name), now[name])})" for name in differing]
    if changed:
        raise ValueError(
            f"'{checkpoint}' was trained with another {' and another '.join(changed)}; "
            "delete that run, or choose another name="
        )
    return int(content["global_step"])


def _differing(before: Any, now: Any) -> str:
    """What it was and is, of mappings only what is different."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before}, not {now}" if before is not None else f"not {now}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)}, not {now.get(name)}" for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
