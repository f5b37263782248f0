"""What training a transformer costs: `python -m dalle1.plan experiment=paper trainer.devices=8 trainer.num_nodes=16`.

Takes the options of `train.py stage=transformer` and `plan.*` (see conf/plan.yaml), and needs neither a GPU nor data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from tabulate import tabulate

from dalle1.cli import errors_in_one_line, run_script
from dalle1.models.accounting import Weights, count_flops, count_weights
from dalle1.models.attention import resolve_backend
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.training.communication import Communication, handed_bytes, kept_bytes
from dalle1.training.cost import (
    Hardware,
    Training,
    count_communication,
    count_memory,
    count_seconds,
    largest_batch,
)
from dalle1.training.run import build
from dalle1.training.trainer import check_precision
from dalle1.training.transformer_module import ComputeConfig, TransformerOptimConfig

# What the paper says of its models, by layers and width (table 1; app. B.1): weights without embeddings.
PAPER_SIZES = {(64, 1920): "2.8 billion", (64, 2688): "5.6 billion", (64, 3968): "12 billion"}
PAPER_UPDATES, PAPER_BATCH = 430_000, 1024  # app. B.2
_MEMORY_ROWS = {
    "weights": "weights",
    "gathered_weights": "gathered weights",
    "gradients": "gradients",
    "buckets": "their copies to send",
    "unsent": "not sent yet",
    "moments": "Adam's moments",
    "average": "average",
    "activations": "activations",
    "logits": "logits",
    "total": "total",
}


def plan(cfg: DictConfig) -> str:
    """The tables for what a configuration of stage=transformer describes.

    Raises: ValueError or TypeError if training would refuse it, or if it leaves the number of GPUs open.
    """
    if cfg.stage.name != "transformer":
        raise ValueError(f"a plan must be for stage=transformer, the only one it knows, got stage={cfg.stage.name}")
    hardware, training = build(cfg, "plan", Hardware), training_of(cfg)
    return "\n\n".join(
        (
            _describe(training),
            _weights_table(training.model, training.weights),
            _flops_table(training),
            _memory_table(training, hardware),
            _communication_lines(training),
            _time_table(training, hardware, cfg.optim.max_steps),
        )
    )


def training_of(cfg: DictConfig) -> Training:
    """What of a configuration decides its cost. Raises: as `plan`."""
    model, optim = build(cfg, "model", TransformerConfig), build(cfg, "optim", TransformerOptimConfig)
    compute, communication = build(cfg, "compute", ComputeConfig), build(cfg, "communication", Communication)
    precision = str(cfg.trainer.precision)
    check_precision(precision, optim)
    if precision not in ("32", "32-true", "bf16-mixed"):
        raise ValueError(f"trainer.precision must be 32-true or bf16-mixed for a plan, got {precision}")
    devices = _count(cfg, "devices") * _count(cfg, "num_nodes")
    if devices == 1 and type(communication) is not Communication:
        name = type(communication).__name__.lower()
        raise ValueError(f"communication={name} must have several devices, got one; as in trainer.devices=8")
    with torch.device("meta"):
        network = DalleTransformer(model)
    return Training(
        model=model,
        weights=count_weights(network),
        devices=devices,
        batch_size=optim.batch_size,
        passes=_count(cfg, "accumulate_grad_batches"),
        backend=resolve_backend(
            compute.attention_backend,
            torch.device("cuda"),
            head_dim=model.d_model // model.n_heads,
            n_states=model.layout.n_states,
        ),
        mixed=precision == "bf16-mixed" or optim.resblock_gradient_scaling,
        has_average=optim.ema_decay > 0,
        handed_bytes=handed_bytes(communication, network),
        kept_bytes=kept_bytes(communication, network),
    )


def _count(cfg: DictConfig, name: str) -> int:
    """An option of the trainer; 1 is Lightning's default for all that are asked for."""
    value = cfg.trainer.get(name, 1)
    if type(value) is not int or value < 1:
        raise ValueError(f"trainer.{name} must be a whole number >= 1 for a plan, got {value}; as in trainer.{name}=8")
    return value


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers=headers, colalign=align, disable_numparse=True)


def _describe(training: Training) -> str:
    model, layout = training.model, training.model.layout
    return (
        f"{model.n_layers} layers of {model.d_model} with {model.n_heads} heads; {layout.n_states} states, "
        f"{layout.text_states} of text, {layout.image_states} of a picture; {training.backend} attention, "
        f"{16 if training.mixed else 32}-bit matrix products"
    )


def _weights_table(model: TransformerConfig, weights: Weights) -> str:
    paper = PAPER_SIZES.get((model.n_layers, model.d_model), "-")
    rows = [
        ("blocks", f"{weights.blocks:,}", paper),
        ("embeddings", f"{weights.embeddings:,}", ""),
        ("heads", f"{weights.heads:,}", ""),
        ("total", f"{weights.total:,}", ""),
    ]
    return _table(("weights", "number", "in the paper"), rows)


def _flops_table(training: Training) -> str:
    """Of forward and backward pass."""
    model, samples = training.model, training.global_batch
    flops = count_flops(model)
    without_mask = model.n_layers * 2 * model.d_model * model.layout.n_states * (model.layout.n_states + 1)
    parts = {
        "blocks' matrices": flops.linear,
        "attention": flops.attention,
        "heads": flops.heads,
        "total": flops.total,
        "(attention, if all were full)": without_mask,
    }
    rows = [(name, _three_digits(3 * n / 1e9), _three_digits(3 * n * samples / 1e9)) for name, n in parts.items()]
    return _table(("10^9 operations", "per sample", f"per update of {samples:,}"), rows)


def _ways(training: Training) -> dict[str, dict[str, bool]]:
    """Ways to train, and what `count_memory` calls them."""
    sharded = {"DDP": False, "FSDP": True} if training.devices > 1 else {"one GPU": False}
    return {
        f"{name}{', checkpointing' if recompute else ''}": {"sharded": value, "recompute": recompute}
        for name, value in sharded.items()
        for recompute in (False, True)
    }


def _memory_table(training: Training, hardware: Hardware) -> str:
    ways, limit = _ways(training), hardware.gpu_gigabytes
    memory = [count_memory(training, **way) for way in ways.values()]
    parts = {label: [getattr(each, name) for each in memory] for name, label in _MEMORY_ROWS.items()}
    rows = [
        (label, *(_three_digits(size / 1e9) if size else "-" for size in sizes))
        for label, sizes in parts.items()
        if any(sizes)
    ]
    rows.append((f"fits into {limit:g} GB", *("yes" if each.total <= limit * 1e9 else "NO" for each in memory)))
    rows.append(("largest batch that fits", *(f"{largest_batch(training, limit, **way):,}" for way in ways.values())))
    return _table((f"GB per GPU, batch {training.batch_size:,}", *ways), rows)


def _three_digits(number: float) -> str:
    """Three digits or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:#.3g}"


def _communication_lines(training: Training) -> str:
    if training.devices == 1:
        return "one GPU sends nothing"
    ddp, fsdp = (count_communication(training, sharded=sharded) / 1e9 for sharded in (False, True))
    return (
        f"each GPU sends per update: DDP {_three_digits(ddp)} GB (gradients), "
        f"FSDP {_three_digits(fsdp)} GB (blocks twice a pass, the rest once, gradients)"
    )


def _time_table(training: Training, hardware: Hardware, max_steps: int) -> str:
    runs = {
        f"{max_steps:,} updates of {training.global_batch:,}": max_steps * training.global_batch,
        f"the paper's {PAPER_UPDATES:,} of {PAPER_BATCH:,}": PAPER_UPDATES * PAPER_BATCH,
    }
    seconds = {name: count_seconds(training, hardware, samples) for name, samples in runs.items()}
    rows = [
        (name, f"{samples:,}", _duration(seconds[name]), f"{seconds[name] * training.devices / 3600:,.0f}")
        for name, samples in runs.items()
    ]
    used = f"{hardware.mfu:.0%} of {hardware.teraflops:g} teraflops"
    head = f"{training.devices:,} GPU{'s' if training.devices > 1 else ''} at {used}"
    return _table((head, "samples", "time", "GPU hours"), rows)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds / 60:.1f} minutes"


@errors_in_one_line()
def main() -> None:
    """Command line, with Hydra's options."""
    config_dir = Path("conf").absolute()
    if not (config_dir / "plan.yaml").is_file():
        raise FileNotFoundError(f"no configuration in '{config_dir}'; run this in the directory of train.py")
    run_script(
        lambda cfg: print(plan(cfg)),
        config_dir=config_dir,
        config_name="plan",
        text_options=("data.background",),
        path_options=("name", "run_dir", "results_dir", "dvae", "text_tokenizer", "data.train", "data.val"),
    )


if __name__ == "__main__":
    main()
