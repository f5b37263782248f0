"""Every implementation of attention computes what a loop over queries and keys computes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dalle1.models.attention import CausalAttention, DenseAttention, build_attention, resolve_backend
from dalle1.models.attention_masks import StreamLayout
from dalle1.models.flex_attention import FlexAttention
from dalle1.models.local_attention import LocalAttention, _local_attention, choose_blocks
from dalle1.models.options import AttentionBackend, AttentionPattern

CPU = torch.device("cpu")
PATTERNS: tuple[AttentionPattern, ...] = ("row", "column", "conv", "full")


def layout(text: int, height: int, width: int, **options: object) -> StreamLayout:
    values: dict[str, object] = {"image_states": height * width - 1, "conv_kernel_size": 3, "conv_offsets": "wrapped"}
    return StreamLayout(text_states=text, grid_height=height, grid_width=width, **(values | options))  # type: ignore[arg-type]


def random_qkv(shape: StreamLayout, dtype: torch.dtype = torch.float64, *, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, shape.n_states, 3, 2, 16, generator=generator, dtype=torch.float64)
    return qkv.to(dtype).requires_grad_(True)


def values_and_gradient(attend: object, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out and, for a fixed gradient of it, what comes back."""
    values = attend(qkv)  # type: ignore[operator]
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values, torch.autograd.grad(values, qkv, upstream.to(values))[0]


def test_dense_attention_equals_a_loop_over_heads_and_queries() -> None:
    shape = layout(2, 2, 3)
    qkv = random_qkv(shape)
    mask = shape.mask("row")
    expected = torch.zeros(2, shape.n_states, 2, 16, dtype=torch.float64)
    for sequence in range(2):
        q, k, v = qkv[sequence].unbind(1)
        for head in range(2):
            for query in range(shape.n_states):
                keys = [key for key in range(shape.n_states) if mask[query, key]]
                scores = torch.stack([q[query, head] @ k[key, head] for key in keys]) / 4
                for weight, key in zip(scores.softmax(0), keys, strict=True):
                    expected[sequence, query, head] += weight * v[key, head]
    torch.testing.assert_close(DenseAttention(shape, "row", CPU)(qkv), expected)


GRIDS = [
    pytest.param(layout(5, 3, 4), id="3x4"),
    pytest.param(layout(1, 4, 4, image_states=16), id="4x4, one text state"),
    pytest.param(layout(9, 6, 5, conv_kernel_size=5), id="6x5, kernel 5"),
    pytest.param(layout(3, 2, 7, image_states=14, conv_kernel_size=11), id="2x7, kernel wider than the grid"),
    pytest.param(layout(40, 9, 13, conv_kernel_size=7), id="9x13, kernel 7"),
    pytest.param(layout(4, 1, 9), id="one row"),
    pytest.param(layout(4, 9, 1), id="one column"),
    pytest.param(layout(2, 1, 1, image_states=1), id="one cell"),
]


@pytest.mark.parametrize("conv_offsets", ["wrapped", "raster"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", GRIDS)
def test_local_attention_equals_dense_attention(
    shape: StreamLayout, pattern: AttentionPattern, conv_offsets: str
) -> None:
    shape = StreamLayout(**(vars(shape) | {"conv_offsets": conv_offsets}))
    qkv = random_qkv(shape)
    expected = values_and_gradient(DenseAttention(shape, pattern, CPU), qkv)
    for got, wanted in zip(values_and_gradient(LocalAttention(shape, pattern, CPU), qkv), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore")  # FlexAttention and the tracer that it calls warn of what they are made to do
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", GRIDS)
def test_flex_attention_equals_dense_attention(
    shape: StreamLayout, pattern: AttentionPattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Uncompiled FlexAttention computes all scores under the same masks, also gradients, if it is not stopped.
    uncompiled = torch.nn.attention.flex_attention.flex_attention
    monkeypatch.setattr("dalle1.models.flex_attention._compiled", lambda: uncompiled)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    qkv = random_qkv(shape)
    expected = values_and_gradient(DenseAttention(shape, pattern, CPU), qkv)
    for got, wanted in zip(values_and_gradient(FlexAttention(shape, pattern, CPU), qkv), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    text=st.integers(1, 256),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel=st.integers(0, 6).map(lambda k: 2 * k + 1),
    missing=st.integers(0, 1),
    pattern=st.sampled_from(PATTERNS),
)
def test_local_attention_equals_dense_attention_for_any_sizes(
    text: int, height: int, width: int, kernel: int, missing: int, pattern: AttentionPattern
) -> None:
    shape = layout(text, height, width, image_states=max(1, height * width - missing), conv_kernel_size=kernel)
    qkv = random_qkv(shape, batch=1)
    expected = values_and_gradient(DenseAttention(shape, pattern, CPU), qkv)
    for got, wanted in zip(values_and_gradient(LocalAttention(shape, pattern, CPU), qkv), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_local_attention_of_the_paper_in_fp32(pattern: AttentionPattern) -> None:
    shape = layout(257, 32, 32, conv_kernel_size=11)
    qkv = random_qkv(shape, torch.float32, batch=1)
    expected = values_and_gradient(DenseAttention(shape, pattern, CPU), qkv.double().detach().requires_grad_(True))
    for got, wanted in zip(values_and_gradient(LocalAttention(shape, pattern, CPU), qkv), expected, strict=True):
        # Sums of up to 1280 products in fp32.
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_local_attention_in_16_bits_has_scores_in_fp32(dtype: torch.dtype) -> None:
    shape = layout(7, 5, 6)
    low = random_qkv(shape, dtype)
    with torch.autocast("cpu", dtype=dtype):
        got = values_and_gradient(LocalAttention(shape, "conv", CPU), low)
    expected = values_and_gradient(DenseAttention(shape, "conv", CPU), low.double().detach().requires_grad_(True))
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == dtype
        # Of values of up to 3: rounded probabilities, values and results.
        torch.testing.assert_close(value.double(), wanted, atol=16 * torch.finfo(dtype).eps, rtol=0)


def test_scores_of_16_bit_factors_are_not_rounded() -> None:
    # Two keys whose scores are 32 and 32.0625: bf16, with 8 bits, has no number between 32 and 32.25.
    shape = layout(2, 1, 1, image_states=1)
    qkv = torch.zeros(1, 3, 3, 1, 16, dtype=torch.bfloat16)
    qkv[0, :, 0, 0, :2] = torch.tensor([4.0, 0.5])  # queries; the softmax's scale is 1/4
    qkv[0, 0, 1, 0, :2] = torch.tensor([32.0, 0.0])
    qkv[0, 1, 1, 0, :2] = torch.tensor([32.0, 0.5])
    qkv[0, 2, 1, 0, 0] = -32.0
    qkv[0, 0, 2, 0, 0] = 1.0  # the first key's share of the weights is the first value
    share = LocalAttention(shape, "full", CPU)(qkv)[0, 2, 0, 0]
    assert float(share) == pytest.approx(1 / (1 + math.exp(0.0625)), abs=2**-9)
    assert float(share) != 0.5


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_local_attention_does_not_depend_on_how_heads_are_grouped(
    monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    shape = layout(7, 5, 6)
    qkv = random_qkv(shape)
    expected = values_and_gradient(DenseAttention(shape, "row", CPU), qkv)
    monkeypatch.setattr("dalle1.models.local_attention._GROUP_BYTES", {"cpu": group_bytes})
    for got, wanted in zip(values_and_gradient(LocalAttention(shape, "row", CPU), qkv), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_local_attention_passes_torchs_checks_of_custom_operators() -> None:
    shape = layout(3, 2, 4)
    attend = LocalAttention(shape, "column", CPU)
    arguments = (random_qkv(shape), attend._bias.double(), attend._order, 3)
    torch.library.opcheck(_local_attention, arguments)


def test_blocks_of_the_paper_are_far_smaller_than_the_stream() -> None:
    shape = layout(257, 32, 32, conv_kernel_size=11)
    row, column, conv = (choose_blocks(shape, pattern) for pattern in ("row", "column", "conv"))
    assert (row.column_major, row.queries, row.window) == (False, 32, 64)
    assert (column.column_major, column.queries, column.window) == (True, 32, 32)
    assert not conv.column_major
    assert conv.window <= 320


def test_a_window_covers_every_key_that_a_pattern_allows() -> None:
    for height, width in ((4, 6), (5, 5), (3, 11)):
        for pattern in PATTERNS:
            shape = layout(2, height, width)
            blocks = choose_blocks(shape, pattern)
            order = shape.image_order(column_major=blocks.column_major)
            place = {state: number for number, state in enumerate(order)}
            for query, key in shape.image_mask(pattern).nonzero().tolist():
                end = (place[query] // blocks.queries + 1) * blocks.queries
                assert end - blocks.window <= place[key] < end


@pytest.mark.parametrize("image_states", [11, 12])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_count_pairs_is_the_number_of_allowed_pairs(pattern: AttentionPattern, image_states: int) -> None:
    shape = layout(3, 4, 3, image_states=image_states)
    assert shape.count_pairs(pattern) == int(shape.mask(pattern).sum())


def test_column_major_order_keeps_a_missing_last_state_last() -> None:
    assert layout(1, 2, 3, image_states=6).image_order(column_major=True) == [0, 3, 1, 4, 2, 5]
    assert layout(1, 2, 3).order(column_major=True) == [0, 1, 4, 2, 5, 3]


@pytest.mark.parametrize("backend", ["local", "flex"])
def test_patterns_that_hide_nothing_are_causal_attention(backend: AttentionBackend) -> None:
    attend = build_attention(layout(3, 2, 2), "full", backend, CPU)
    assert isinstance(attend, CausalAttention)
    qkv = random_qkv(layout(3, 2, 2))
    torch.testing.assert_close(attend(qkv), DenseAttention(layout(3, 2, 2), "full", CPU)(qkv))


def test_auto_is_flex_on_cuda_and_local_elsewhere_but_for_short_streams() -> None:
    cuda = torch.device("cuda", 0)
    assert resolve_backend("auto", CPU, head_dim=64, n_states=1280) == "local"
    assert resolve_backend("auto", CPU, head_dim=64, n_states=164) == "dense"
    assert resolve_backend("auto", cuda, head_dim=64, n_states=164) == "flex"
    assert resolve_backend("auto", cuda, head_dim=8, n_states=1280) == "local"
    assert resolve_backend("dense", cuda, head_dim=64, n_states=1280) == "dense"


def test_flex_is_refused_where_it_has_no_gradient() -> None:
    with pytest.raises(ValueError, match="heads of at least 16 dimensions, got cpu and 64"):
        resolve_backend("flex", CPU, head_dim=64, n_states=1280)
    with pytest.raises(ValueError, match="got cuda and 8; use attention_backend=auto"):
        resolve_backend("flex", torch.device("cuda"), head_dim=8, n_states=1280)


def test_scores_too_large_for_exp_are_no_matter() -> None:
    shape = layout(3, 2, 3)
    qkv = (random_qkv(shape) * torch.tensor([100, 100, 1])[:, None, None]).detach().requires_grad_(True)
    expected = values_and_gradient(DenseAttention(shape, "row", CPU), qkv)
    for got, wanted in zip(values_and_gradient(LocalAttention(shape, "row", CPU), qkv), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["local", "flex"])
def test_backends_agree_on_cuda(
    backend: AttentionBackend, pattern: AttentionPattern, dtype: torch.dtype, tolerance: float
) -> None:
    cuda = torch.device("cuda")
    shape = layout(257, 32, 32, conv_kernel_size=11)
    low = random_qkv(shape, dtype).to(cuda).detach().requires_grad_(True)
    expected = values_and_gradient(DenseAttention(shape, pattern, cuda), low.detach().double().requires_grad_(True))
    got = values_and_gradient(build_attention(shape, pattern, backend, cuda), low)
    for value, wanted in zip(got, expected, strict=True):
        # fp32 products may be rounded to TF32 on the way.
        torch.testing.assert_close(value.double(), wanted, atol=tolerance, rtol=tolerance)
