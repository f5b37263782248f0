"""How many sequences to decode at once."""

from __future__ import annotations

import psutil
import torch

from dalle1.models.kv_cache import count_slots
from dalle1.models.transformer import TransformerConfig

# Of the memory that is free: the rest is for pictures, the dVAE, and what else the machine does.
_MEMORY_SHARE = 0.5
# More rows make a step hardly faster per row: half of what 64 gain over 32 (docs/benchmarks.md) - and a batch that is
# interrupted is lost.
_MOST_ON_CPU, _MOST_ON_GPU = 64, 512
# Tensors of a row's logits in float64 that exist at once while a code is drawn, its sorting included.
_LOGITS_COPIES = 8


def auto_batch_size(config: TransformerConfig, *, device: torch.device, dtype: torch.dtype, guided: bool) -> int:
    """Sequences that fit into half of the memory that is free now, at least 1, at most as many as still help.

    `guided` sequences have two rows each. Each row is counted with a text of its own, as where every prompt has one
    candidate.
    """
    most = _MOST_ON_GPU if device.type == "cuda" else _MOST_ON_CPU
    rows = 2 if guided else 1
    return max(1, min(most, int(_MEMORY_SHARE * free_memory(device)) // (rows * bytes_per_row(config, dtype))))


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
    return int(psutil.virtual_memory().available)
