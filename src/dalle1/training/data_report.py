"""What a stage has to say, at its end, of the data that it was given."""

from __future__ import annotations

import logging

from pytorch_lightning.utilities import rank_zero_only

from dalle1.data.datamodule import PairDataModule
from dalle1.data.findings import CUT_CAPTION

logger = logging.getLogger(__name__)


def report_findings(data: PairDataModule) -> dict[str, int]:
    """Say in a line each how many captions were cut, and how many samples skipped and why; return both numbers."""
    kinds = data.count_findings()
    n_cut = kinds.pop(CUT_CAPTION, 0)
    if n_cut:
        rank_zero_only(logger.warning)(f"{n_cut:,} of the captions that were read had too many tokens and were cut")
    if kinds:
        reasons = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common())
        n_samples = data.n_samples_used()
        of_all = f" of {n_samples:,} samples" if n_samples is not None else " samples"
        rank_zero_only(logger.warning)(f"{kinds.total():,}{of_all} skipped: {reasons}")
    found = {"bad_samples": kinds.total()}
    if data.config.filters.is_active:
        found["filtered_samples"] = data.count_dropped().total()
    return found if data.encode_text is None else found | {"cut_captions": n_cut}
