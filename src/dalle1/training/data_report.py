"""What a stage has to say, at its end, of the data that it was given."""

from __future__ import annotations

import logging
from collections import Counter

from pytorch_lightning.utilities import rank_zero_only

from dalle1.data.datamodule import PairDataModule
from dalle1.data.findings import CUT_CAPTION
from dalle1.data.shard_scan import DAMAGE_KINDS

logger = logging.getLogger(__name__)


def report_findings(data: PairDataModule) -> dict[str, int]:
    """Say in a line each how many captions were cut, samples skipped, shards damaged, and why; return these."""
    kinds = data.count_findings()
    n_cut = kinds.pop(CUT_CAPTION, 0)
    if n_cut:
        rank_zero_only(logger.warning)(f"{n_cut:,} of the captions that were read had too many tokens and were cut")
    damages = Counter({kind: kinds.pop(kind) for kind in DAMAGE_KINDS if kind in kinds})
    if kinds:
        n_samples = data.n_samples_used()
        of_all = f" of {n_samples:,} samples" if n_samples is not None else " samples"
        rank_zero_only(logger.warning)(f"{kinds.total():,}{of_all} skipped: {_listed(kinds)}")
    if damages:
        rank_zero_only(logger.warning)(f"damage of shards, of which the rest was used: {_listed(damages)}")
    found = {"bad_samples": kinds.total(), "damages": damages.total()}
    if data.config.filters.is_active:
        found["filtered_samples"] = data.count_dropped().total()
    return found if data.encode_text is None else found | {"cut_captions": n_cut}


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common())
