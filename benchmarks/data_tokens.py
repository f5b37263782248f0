"""What image tokens made once are worth: how fast they are read, and a training step without the dVAE."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import Rows
from our_transformer import make_step

from dalle1.data.dataset import PairDataset
from dalle1.data.loader import ResumableLoader
from dalle1.data.order import SampleOrder
from dalle1.data.preparation import Preparation, TokenSource
from dalle1.data.shards import ShardIndex
from dalle1.data.token_shards import EncodedSample, write_token_shard
from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.tokenizers.caption_encoder import CaptionEncoder
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig
from dalle1.training.allocator import keep_freed_memory

N_SAMPLES, BATCH_SIZE = 2048, 32
GRID, VOCAB_SIZE = (32, 32), 8192
CAPTION = "a photograph of a small red house by a lake in the evening, number {}"
# The transformer of the other benchmarks, and the paper's dVAE: pictures of 256 x 256 pixels.
TRANSFORMER = TransformerConfig(d_model=512, n_layers=8, n_heads=8)
STEP_BATCH = 2


def measure_reading(rounds: int) -> Rows:
    """Image tokens per second of one process with one thread, as training reads them, captions with BPE dropout."""
    captions = [CAPTION.format(i) for i in range(N_SAMPLES)]
    tokenizer = TextTokenizer.train(captions, TextTokenizerConfig(vocab_size=16_384, seq_len=256))
    rng = np.random.default_rng(0)
    rows: Rows = []
    for crops in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "tokens.tar")
            arrays = (rng.integers(0, VOCAB_SIZE, (crops, *GRID)).astype(np.uint16) for _ in range(N_SAMPLES))
            samples = (EncodedSample(f"{i:06d}", array, captions[i].encode(), b"{}") for i, array in enumerate(arrays))
            write_token_shard(path, samples)
            preparation = Preparation(
                image_size=256,
                encode_text=CaptionEncoder(tokenizer, truncate=True, bpe_dropout=0.1),
                vary_text=True,
                tokens=TokenSource(grid=GRID, vocab_size=VOCAB_SIZE),
            )
            order = SampleOrder([N_SAMPLES], seed=0)
            loader = ResumableLoader(PairDataset(ShardIndex(str(path)), preparation), order, batch_size=BATCH_SIZE)
            seconds = _fastest(partial(_read_all, loader), rounds)
            size = path.stat().st_size
        rows.append(
            {
                "crops": crops,
                "kB_per_sample": round(size / N_SAMPLES / 1000, 1),
                "samples_per_second": round(N_SAMPLES / seconds),
                "image_tokens_per_second": round(N_SAMPLES * GRID[0] * GRID[1] / seconds),
            }
        )
    return rows


def _read_all(loader: ResumableLoader) -> None:
    for _ in loader:
        pass


def measure_step(rounds: int) -> Rows:
    """A training step from tokens and from pictures, which the paper's dVAE encodes first; all threads, as trained."""
    keep_freed_memory()
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(DVAE(DVAEConfig()), sha256="")
    image = torch.rand(STEP_BATCH, 3, 256, 256)
    step = make_step(DalleTransformer(TRANSFORMER), STEP_BATCH)
    encoding, training = (_fastest(work, rounds) for work in (lambda: tokenizer.encode(image), step))
    return [
        {
            "batch": STEP_BATCH,
            "encoding_seconds": round(encoding, 2),
            "pictures_encoded_per_second": round(STEP_BATCH / encoding, 2),
            "step_seconds_from_tokens": round(training, 2),
            "step_from_pictures_over_from_tokens": round((encoding + training) / training, 2),
        }
    ]


def _fastest(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest round; the first one warms up."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
