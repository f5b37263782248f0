"""Static steps: the same operations on the same memory at every position, as a CUDA graph needs them.

A CPU has no such graphs. `Recording` stands for one: it notes every operation of a step with its operands and does the
same operations on the same tensors again. Whatever a step would compute in Python from the position, or read back from
the device, would then be that of the position at which it was recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle1.models import cuda_graph
from dalle1.models.decoding import Decoder, Decoding
from dalle1.models.transformer import DalleTransformer

MakeTransformer = Callable[..., DalleTransformer]
READS_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")


class Recording(TorchDispatchMode):
    """What `CudaGraph` is on a GPU."""

    made = 0  # in this test

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        super().__init__()
        type(self).made += 1
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        function()
        with self:
            self._result = function()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in READS_BACK), f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()  # a graph does not ask in which mode its tensors were made
    def replay(self) -> Tensor:
        for func, args, kwargs, before in self._calls:
            after = func(*args, **kwargs)
            for new, old in zip(tree_leaves(after), tree_leaves(before), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():  # otherwise a view, or done in place
                    old.copy_(new)
        return self._result


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    """Static steps are recorded, and counted."""
    monkeypatch.setattr(Recording, "made", 0)
    monkeypatch.setattr("dalle1.models.decoding.try_to_record", Recording)
    return Recording


def _tokens(model: DalleTransformer, texts: int, pictures: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    text = torch.randint(config.text_vocab_size, (texts, config.text_seq_len), generator=generator)
    return text, torch.randint(config.image_vocab_size, (pictures, config.image_seq_len), generator=generator)


def _logits(decoding: Decoding, image: Tensor) -> Tensor:
    """Logits of every position of given pictures, (r, n, v)."""
    return torch.stack([decoding.logits] + [decoding.step(column) for column in image[:, :-1].T], dim=1)


def _guided(decoder: Decoder, text: Tensor, candidates: int) -> Decoding:
    """Two prompts, and as many rows without one."""
    texts = [decoder.prefill(each[None]) for each in text]
    return Decoding(decoder, [(texts[:2], candidates), (texts[2:], 2 * candidates)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("start", ["one", "two"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": ("full", "conv", "column", "row")},
        {"attention": ("column", "column", "conv", "full"), "conv_offsets": "raster"},
        # Rings go around several times.
        {"grid_height": 9, "grid_width": 2},
        {"grid_height": 6, "grid_width": 5, "conv_offsets": "raster"},
        {"grid_height": 1, "grid_width": 7},
        {"grid_height": 7, "grid_width": 1, "conv_kernel_size": 5},
    ],
    ids=str,
)
def test_a_recorded_step_has_the_logits_of_the_other_at_every_position(
    make_transformer: MakeTransformer, options: dict[str, Any], start: str, mode: Any, recording: type[Recording]
) -> None:
    model = make_transformer(**options, start=start)
    text, image = _tokens(model, 3, 8)
    with mode():
        expected = _logits(_guided(Decoder(model), text, 2), image)
        logits = _logits(_guided(Decoder(model, static=True), text, 2), image)
    assert recording.made == 1
    # Products of more numbers, some of them zeros, are summed in another order.
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_a_recorded_step_has_the_same_bits_as_a_static_one(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_transformer()
    text, image = _tokens(model, 3, 12)
    expected = _logits(_guided(Decoder(model, static=True), text, 3), image)
    monkeypatch.setattr("dalle1.models.decoding.try_to_record", Recording)
    assert torch.equal(_logits(_guided(Decoder(model, static=True), text, 3), image), expected)


def test_pictures_of_the_same_shape_share_a_recording(
    make_transformer: MakeTransformer, recording: type[Recording]
) -> None:
    model = make_transformer(start="two")
    decoder = Decoder(model, static=True)
    for batch, candidates in enumerate((2, 2, 2, 1)):
        text, image = _tokens(model, 3, 4 * candidates, seed=batch)
        # One in `inference_mode`, the next without: what is kept must be good for both.
        with torch.inference_mode(batch % 2 == 0):
            logits = _logits(_guided(decoder, text, candidates), image)
        expected = _logits(_guided(Decoder(model), text, candidates), image)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert recording.made == 2, "one, and one for the smaller batch at the end"


def test_pictures_at_the_same_time_have_memory_of_their_own(
    make_transformer: MakeTransformer, recording: type[Recording]
) -> None:
    model = make_transformer()
    decoder = Decoder(model, static=True)
    (text, image), (other_text, other_image) = _tokens(model, 3, 4), _tokens(model, 3, 4, seed=6)
    _logits(_guided(decoder, text, 1), image)  # leaves its memory
    first, second = _guided(decoder, text, 1), _guided(decoder, other_text, 1)
    logits = [(first.logits, second.logits)]
    logits += [(first.step(a), second.step(b)) for a, b in zip(image[:, :-1].T, other_image[:, :-1].T, strict=True)]
    for side, (of_text, of_image) in enumerate([(text, image), (other_text, other_image)]):
        expected = _logits(_guided(Decoder(model), of_text, 1), of_image)
        torch.testing.assert_close(torch.stack([each[side] for each in logits], 1), expected, atol=2e-5, rtol=1e-4)


def test_candidates_that_share_a_beginning_are_recorded_too(
    make_transformer: MakeTransformer, recording: type[Recording]
) -> None:
    model = make_transformer(start="two")
    text, image = _tokens(model, 3, 4)
    image[:, 5:] = image[:, 5:].flip(0)
    logits = []
    for decoder in (Decoder(model), Decoder(model, static=True)):
        prefix = _guided(decoder, text, 1)
        for column in image[:, :5].T:
            prefix.step(column)
        for _ in range(2):
            decoding = prefix.spread(3)
            logits.append(torch.stack([decoding.step(column.repeat_interleave(3)) for column in image[:, 5:-1].T]))
    assert recording.made == 2, "one of the beginning, one of the rest, which the second time is there"
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0], atol=2e-5, rtol=1e-4)


def test_memory_of_unknown_content_does_not_matter(make_transformer: MakeTransformer) -> None:
    model = make_transformer(attention=("row", "column", "conv", "full"))
    decoder = Decoder(model, static=True)
    text, image = _tokens(model, 3, 4)
    first = _guided(decoder, text, 1)
    expected = _logits(first, image)
    kept = decoder._kept
    assert kept is not None
    for layer in kept.layers:
        layer.image._keys.fill_(torch.nan)
        layer.image._values.fill_(torch.inf)
    assert torch.equal(_logits(_guided(decoder, text, 1), image), expected)


def test_what_cannot_be_recorded_goes_on_with_a_warning(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise cuda_graph.NotRecordedError("operation not permitted when stream is capturing")

    model = make_transformer()
    text, image = _tokens(model, 3, 4)
    expected = _logits(_guided(Decoder(model, static=True), text, 1), image)
    monkeypatch.setattr(cuda_graph, "CudaGraph", fail)
    monkeypatch.setattr(
        "dalle1.models.decoding.try_to_record",
        lambda step, device: cuda_graph.try_to_record(step, torch.device("cuda")),
    )
    with caplog.at_level(logging.WARNING):
        logits = _logits(_guided(Decoder(model, static=True), text, 1), image)
    assert torch.equal(logits, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding goes on without a CUDA graph, which is slower: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("an error of the step itself")])
def test_other_errors_are_not_a_reason_to_go_on(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cuda_graph, "CudaGraph", fail)
    with pytest.raises(type(error)):
        cuda_graph.try_to_record(lambda: torch.zeros(1), torch.device("cuda"))


def test_a_compiled_step_has_the_logits_of_the_other_and_a_graph_for_each_pattern(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[object] = []

    def compiler(graph: Any, inputs: Any) -> Any:  # without code generation, which takes many seconds
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    torch._dynamo.reset()
    model = make_transformer(n_layers=5, attention=("row", "column", "row", "column", "row"))
    text, image = _tokens(model, 3, 8)
    expected = _logits(_guided(Decoder(model), text, 2), image)
    decoder = Decoder(model, static=True, compiled=True)
    for _ in range(2):
        logits = _logits(_guided(decoder, text, 2), image)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert len(graphs) == 2


def test_steps_of_changing_shapes_are_not_compiled(make_transformer: MakeTransformer) -> None:
    with pytest.raises(ValueError, match="compiled steps must be static"):
        Decoder(make_transformer(), compiled=True)
