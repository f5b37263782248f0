"""What a transformer costs: operations, weights, and memory that its forward pass leaves for the backward pass.

Operations are those that its definition asks for, whatever computes them: a multiply-add counts as two. Attention
counts the pairs that the masks allow, so a sparse layer costs what its pattern needs; recomputed activations, embedding
look-ups and everything that is linear in d_model (norms, activations, softmax) count nothing, as is usual for model
FLOPs utilisation (Chowdhery et al. 2022, app. B).

Memory is what autograd saves in uncompiled blocks; a compiler may keep less. Tests hold it against what the backends
`local` and `dense` leave on a CPU; for `flex` it is derived from the tensors that its backward pass takes.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache

from dalle1.models.attention_masks import StreamLayout
from dalle1.models.linear_cross_entropy import rows_per_chunk
from dalle1.models.local_attention import choose_blocks
from dalle1.models.options import AttentionBackend, AttentionPattern
from dalle1.models.transformer import DalleTransformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one forward pass over one captioned picture; training takes three times as many."""

    linear: int  # the blocks' matrices
    attention: int  # scores and weighted values
    heads: int  # text classes at text positions, image codes at image positions

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.heads


def count_flops(config: TransformerConfig) -> Flops:
    """Operations of one forward pass over one sample."""
    d, layout = config.d_model, config.layout
    weights_per_block = (4 + 2 * config.mlp_ratio) * d * d
    pairs = sum(layout.count_pairs(pattern) for pattern in config.layer_patterns)
    text, image = config.text_seq_len * config.text_classes, config.image_seq_len * config.image_vocab_size
    return Flops(
        linear=2 * config.n_layers * weights_per_block * layout.n_states,
        attention=4 * d * pairs,
        heads=2 * d * (text + image),
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Number of weights by where they are."""

    blocks: int  # what papers count
    embeddings: int  # tokens, positions, start states
    heads: int  # and the norm before them

    @property
    def total(self) -> int:
        """All of them."""
        return self.blocks + self.embeddings + self.heads


def count_weights(model: DalleTransformer) -> Weights:
    """Weights of a model, which may be on the meta device."""
    counts: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        part = name.partition(".")[0]
        is_head = part == "norm" or part.endswith("head")
        counts["blocks" if part == "blocks" else "heads" if is_head else "embeddings"] += weight.numel()
    return Weights(blocks=counts["blocks"], embeddings=counts["embeddings"], heads=counts["heads"])


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that one forward pass leaves for its backward pass."""

    blocks: int  # what all layers keep
    recomputed: int  # what the largest layer keeps during its backward pass, if until then it keeps only its input
    weight_copies: int  # the layers' matrices in 16 bits, as autocast multiplies them; for any number of samples
    ends: int  # the last norm, and the gradient of its output, which the heads compute at once

    @property
    def total(self) -> int:
        """At the start of the backward pass, or a little later with `recomputed`."""
        return self.blocks + self.recomputed + self.weight_copies + self.ends


def count_activations(
    config: TransformerConfig, batch_size: int, *, backend: AttentionBackend, mixed: bool, recompute: bool
) -> Activations:
    """Bytes that a batch of samples needs between the forward and the backward pass.

    Args:
        config: Of the model.
        batch_size: Samples of one forward pass.
        backend: How it attends; not `auto`.
        mixed: Blocks multiply in 16 bits under autocast; the sum of their outputs stays in fp32.
        recompute: Each layer keeps its input alone, see `DalleTransformer.execute_blocks`.
    """
    state = 4 * batch_size * config.layout.n_states * config.d_model  # fp32, as between all layers
    layers = Counter(config.layer_patterns)
    sizes = {pattern: _block_bytes(config, pattern, batch_size, backend, 2 if mixed else 4) for pattern in layers}
    copies = 2 * (4 + 2 * config.mlp_ratio) * config.d_model**2 if mixed else 0
    return Activations(
        blocks=config.n_layers * state
        if recompute
        else sum(sizes[pattern] * count for pattern, count in layers.items()),
        recomputed=max(sizes.values()) - state if recompute else 0,
        weight_copies=copies if recompute else config.n_layers * copies,
        ends=2 * state + _norm_statistics(config, batch_size),
    )


def _block_bytes(
    config: TransformerConfig, pattern: AttentionPattern, batch_size: int, backend: AttentionBackend, element: int
) -> int:
    """Of one layer, where matrix products take numbers of `element` bytes."""
    numbers = batch_size * config.layout.n_states * config.d_model
    norms = 2 * (4 * numbers + _norm_statistics(config, batch_size))
    # Inputs of the four matrices, the last of which is mlp_ratio as wide, and of the activation function before it.
    products = element * numbers * (3 + 2 * config.mlp_ratio)
    dropout = 2 * numbers if config.dropout else 0  # CUDA's masks are bytes
    return norms + products + dropout + _attention_bytes(config, pattern, batch_size, backend, element)


def _norm_statistics(config: TransformerConfig, batch_size: int) -> int:
    return 2 * 4 * batch_size * config.layout.n_states  # mean and standard deviation of each state, in fp32


def _attention_bytes(
    config: TransformerConfig, pattern: AttentionPattern, batch_size: int, backend: AttentionBackend, element: int
) -> int:
    """What attention keeps beside its output, which the matrix after it counts."""
    layout, d = config.layout, config.d_model
    qkv = 3 * element * batch_size * layout.n_states * d
    softmax_sums = 4 * batch_size * layout.n_states * config.n_heads  # of each query, in fp32
    if backend == "dense":
        # PyTorch turns the mask into numbers to add to scores, in every layer again.
        return qkv + softmax_sums + element * layout.n_states**2
    if layout.hides_nothing(pattern):
        return qkv + softmax_sums
    if backend == "local":
        return qkv * _rows_of_local(layout, pattern) // layout.n_states
    # To leave column-major order the output is copied: the kernel's own is kept too.
    return qkv + softmax_sums + (qkv // 3 if pattern == "column" else 0)


@cache
def _rows_of_local(layout: StreamLayout, pattern: AttentionPattern) -> int:
    """States as `LocalAttention` arranges them: the image's filled up to blocks, zeros before a short text."""
    blocks = choose_blocks(layout, pattern)
    before = max(0, blocks.window - blocks.queries - layout.text_states)
    return before + layout.text_states + blocks.count * blocks.queries


def count_head_scratch(config: TransformerConfig, batch_size: int, device_type: str) -> int:
    """Bytes that the heads need while they turn states into losses: about three chunks of fp32 logits.

    One is the chunk's logits, which its gradients replace; on CUDA these are also rounded to 16 bits, and beside them
    are the weight in 16 bits and what is added to its gradient."""
    text, image = batch_size * config.text_seq_len, batch_size * config.image_seq_len
    chunks = [
        classes * min(rows, rows_per_chunk(classes, device_type))
        for rows, classes in ((text, config.text_classes), (image, config.image_vocab_size))
    ]
    return 3 * 4 * max(chunks)
