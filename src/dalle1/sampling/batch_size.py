"""How many sequences to decode at once."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from dalle1.models.kv_cache import count_slots
from dalle1.models.transformer import TransformerConfig

# Of the memory that is free: the rest is for pictures, the dVAE, and what else the machine does.
_MEMORY_SHARE = 0.5
# On a CPU more rows are hardly faster (docs/benchmarks.md), and a batch that is interrupted is lost. The most on a GPU,
# as many as the paper's candidates of a prompt, is not measured.
_MOST_ON_CPU, _MOST_ON_GPU = 64, 512
_CONTROL_GROUP = Path("/sys/fs/cgroup")
# Tensors of a row's logits in float64 that exist at once while a code is drawn, its sorting included.
_LOGITS_COPIES = 8


def auto_batch_size(config: TransformerConfig, *, device: torch.device, dtype: torch.dtype, guided: bool) -> int:
    """Sequences that fit into half of the memory that is free now, a power of two, at most as many as still help.

    `guided` sequences have two rows each. Each row is counted with a text of its own, as where every prompt has one
    candidate.
    """
    most = _MOST_ON_GPU if device.type == "cuda" else _MOST_ON_CPU
    rows = 2 if guided else 1
    fitting = int(_MEMORY_SHARE * free_memory(device)) // (rows * bytes_per_row(config, dtype))
    # Not every change of what is free is another size, which on a GPU may be other pictures.
    return 2 ** (max(1, min(most, fitting)).bit_length() - 1)


def bytes_per_row(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Memory of one row: keys and values of its image and text states, and its logits while a code is drawn."""
    layout = config.layout
    # A text is there twice while texts of several prompts are put together.
    states = sum(count_slots(layout, pattern) + 2 * layout.text_states for pattern in config.layer_patterns)
    return 2 * states * config.d_model * dtype.itemsize + 8 * _LOGITS_COPIES * config.image_vocab_size


def free_memory(device: torch.device) -> int:
    """Bytes that are free now: of the GPU for CUDA, else of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch holds and does not use is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(int(psutil.virtual_memory().available), _free_in_container())


def _free_in_container() -> int:
    """What Linux lets this control group still take (version 2), which psutil does not see."""
    try:
        limit, used = ((_CONTROL_GROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no control groups, or no limit: "max"
        return sys.maxsize
