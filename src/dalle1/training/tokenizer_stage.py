"""`train.py stage=tokenizer`: a BPE of the captions."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dalle1.atomic_files import write_json
from dalle1.data.datamodule import PairDataModule
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig
from dalle1.tokenizers.text_file import load_text_tokenizer
from dalle1.training.data_report import report_findings

logger = logging.getLogger(__name__)


def train_tokenizer(
    config: TextTokenizerConfig, data: PairDataModule, path: Path, earlier: dict[str, Any]
) -> dict[str, Any]:
    """Train a BPE on all captions, unless an earlier start did, and return what it gave; it is written to `path`.

    Args:
        config: The tokenizer.
        data: The captions.
        path: Where it is, or will be.
        earlier: What this has returned if it is there.

    Raises: ValueError if `path` holds one of other settings or data, or there is no caption; as
        `PairDataModule.train_captions`.
    """
    trained_on = {
        "data.train": data.config.source_names,
        "data.caption": data.config.caption,
        "filters": data.config.filters.to_dict(),
    }
    counted: dict[str, Any] = {}  # nothing if an earlier start read the captions
    if path.exists():
        tokenizer = load_text_tokenizer(path, vocab_size=config.vocab_size, seq_len=config.seq_len)
        was = {name: getattr(tokenizer, name) for name in asdict(config)}
        changed = [f"{name} {was[name]}, not {now}" for name, now in asdict(config).items() if was[name] != now]
        before = earlier.get("trained_on", trained_on)
        changed += [f"another {name}" for name, now in trained_on.items() if before.get(name) != now]
        if changed:
            raise ValueError(f"'{path}' has {'; '.join(changed)}; delete it or choose another name=")
    else:
        data.prepare_data()
        captions = _Captions(data.train_captions(), data.n_samples_used())
        tokenizer = TextTokenizer.train(captions.read(), config)
        if not captions.n_read:
            raise ValueError("data.train must have at least one good caption, got none; see data.caption")
        write_json(path, tokenizer.to_dict())
        counted = {"trained_on": trained_on, "captions": captions.n_read, **report_findings(data)}
        logger.info(
            "%s captions gave %s of %s entries%s",
            *(f"{number:,}" for number in (counted["captions"], tokenizer.n_entries, config.vocab_size)),
            "; the others stay unused" if tokenizer.n_entries < config.vocab_size else "",
        )
    return {"entries": tokenizer.n_entries, "sha256": tokenizer.sha256, **counted}


class _Captions:
    """Captions with a bar while they are read, and their number afterwards."""

    def __init__(self, captions: Iterator[str], n_samples: int | None) -> None:
        self._captions = captions
        self._n_samples = n_samples
        self.n_read = 0

    def read(self) -> Iterator[str]:
        # Where output is no terminal, a line every half minute.
        every = 0.5 if sys.stderr.isatty() else 30.0
        bar = tqdm(
            self._captions, "reading captions", self._n_samples, unit=" captions", unit_scale=True, mininterval=every
        )
        for caption in bar:
            self.n_read += 1
            yield caption
