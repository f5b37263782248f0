"""The reranker that a configuration asks for by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from dalle1.checkpoint import Loaded
from dalle1.models.transformer import DalleTransformer
from dalle1.rerank.hf_clip import HFCLIPReranker
from dalle1.rerank.likelihood import LikelihoodReranker
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.rerank.reranker import Reranker

Kind = Literal["clip", "hf_clip", "caption_likelihood", "image_likelihood", "none"]


def load_reranker(
    kind: Kind,
    *,
    model: str | None,
    allow_download: bool,
    load_transformer: Callable[[], Loaded[DalleTransformer]],
) -> Reranker | None:
    """Load what ranks pictures; None for `none`.

    Args:
        kind: See `conf/rerank/`.
        model: Checkpoint of `clip`; directory or hub name for `hf_clip`.
        allow_download: Whether `hf_clip` may fetch a model that is not on this machine.
        load_transformer: Called for the likelihoods alone.

    Raises: ValueError for another kind or a `model` that is missing, and what the rerankers raise.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"rerank must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if model is not None and kind not in ("clip", "hf_clip"):
        raise ValueError(f"rerank={kind} takes no model, got rerank.model={model}; leave it out")
    if kind == "none":
        return None
    if kind == "caption_likelihood":
        return LikelihoodReranker(load_transformer(), of="caption")
    if kind == "image_likelihood":
        return LikelihoodReranker(load_transformer(), of="image")
    if model is None:
        raise ValueError(f"rerank={kind} needs a model, got none; give a directory or a name as rerank.model=...")
    return CLIPReranker.load(model) if kind == "clip" else HFCLIPReranker.load(model, allow_download=allow_download)
