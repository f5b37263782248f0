"""The decoding loop: the right distribution, and the same tokens whatever the company."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.models.decoding import Decoder, TextStates
from dalle1.models.transformer import DalleTransformer
from dalle1.sampling.filters import DEFAULT_SAMPLING, SamplingConfig
from dalle1.sampling.sampler import Block, Sampler, candidate_seeds, draw_codes

MakeTransformer = Callable[..., DalleTransformer]


@pytest.fixture(scope="module")
def transformer(make_transformer: MakeTransformer) -> DalleTransformer:
    return make_transformer()


def generate(
    transformer: DalleTransformer,
    text: Tensor,
    *,
    config: SamplingConfig = DEFAULT_SAMPLING,
    negative: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return Sampler(transformer, config, negative=negative).sample(text, **options)


def _text(transformer: DalleTransformer, n_prompts: int) -> Tensor:
    config = transformer.config
    return torch.randint(
        config.text_vocab_size, (n_prompts, config.text_seq_len), generator=torch.Generator().manual_seed(3)
    )


def test_tokens_equal_those_of_a_loop_without_cache(transformer: DalleTransformer) -> None:
    text, config = _text(transformer, 2), SamplingConfig(temperature=0.7, top_k=20)
    tokens = generate(transformer, text, seeds=[[11, 12], [13, 14]], config=config).flatten(2)
    for prompt, candidate, seed in [(0, 0, 11), (0, 1, 12), (1, 0, 13), (1, 1, 14)]:
        stream = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        drawn = torch.zeros(1, 12, dtype=torch.int64)
        for position, number in enumerate(stream):
            with torch.inference_mode():
                logits = transformer(text[prompt : prompt + 1], drawn)[1][0, position].double() / 0.7
            likely = set(logits.argsort(descending=True)[:20].tolist())
            weights = [logits[code].exp().item() if code in likely else 0.0 for code in range(32)]
            below = [total / sum(weights) for total in accumulate(weights)]
            drawn[0, position] = next(code for code in range(32) if below[code] > number)
        assert tokens[prompt, candidate].tolist() == drawn[0].tolist()


def test_guided_tokens_equal_those_of_a_loop_without_cache(transformer: DalleTransformer) -> None:
    text, scale = _text(transformer, 2), 2.5
    tokens = generate(transformer, text, seeds=[[11], [12]], config=SamplingConfig(guidance_scale=scale)).flatten(1)
    size, length = transformer.config.text_vocab_size, transformer.config.text_seq_len
    no_caption = torch.tensor([[size + position for position in range(length)]])
    for prompt, seed in enumerate((11, 12)):
        stream = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        drawn = torch.zeros(1, 12, dtype=torch.int64)
        for position in range(12):
            with torch.inference_mode():
                told = transformer(text[prompt : prompt + 1], drawn)[1][0, position].double().log_softmax(0)
                untold = transformer(no_caption, drawn)[1][0, position].double().log_softmax(0)
            # In probabilities: p(code | caption)^scale * p(code)^(1 - scale), normalised.
            logits = scale * told + (1 - scale) * untold
            drawn[0, position] = draw_codes(logits[None], stream[position : position + 1])
        assert tokens[prompt].tolist() == drawn[0].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 17])
def test_guided_tokens_do_not_depend_on_the_batch_size(transformer: DalleTransformer, batch_size: int) -> None:
    text, config = _text(transformer, 2), SamplingConfig(guidance_scale=1.5)
    seeds = [candidate_seeds(1, str(prompt), 7) for prompt in range(2)]
    expected = generate(transformer, text, seeds=seeds, config=config)
    assert not torch.equal(generate(transformer, text, seeds=seeds), expected)
    assert torch.equal(generate(transformer, text, seeds=seeds, config=config, batch_size=batch_size), expected)


def test_tokens_do_not_depend_on_the_number_of_candidates(transformer: DalleTransformer) -> None:
    text, seeds = _text(transformer, 1), candidate_seeds(0, "a", 40)
    expected = generate(transformer, text, seeds=[seeds])
    assert len({tuple(grid.flatten().tolist()) for grid in expected[0]}) == 40, "candidates differ"
    for n_candidates in (1, 2, 5, 17):
        tokens = generate(transformer, text, seeds=[seeds[:n_candidates]])
        assert torch.equal(tokens, expected[:, :n_candidates])


@pytest.mark.parametrize("batch_size", [1, 3, 16, 17])
def test_tokens_do_not_depend_on_the_batch_size(transformer: DalleTransformer, batch_size: int) -> None:
    text = _text(transformer, 3)
    seeds = [candidate_seeds(1, str(prompt), 7) for prompt in range(3)]
    expected = generate(transformer, text, seeds=seeds, batch_size=128)
    assert torch.equal(generate(transformer, text, seeds=seeds, batch_size=batch_size), expected)


def test_tokens_do_not_depend_on_the_order_of_prompts_and_candidates(transformer: DalleTransformer) -> None:
    text = _text(transformer, 3)
    seeds = [candidate_seeds(2, str(prompt), 4) for prompt in range(3)]
    expected = generate(transformer, text, seeds=seeds)
    backwards = generate(transformer, text.flip(0), seeds=[row[::-1] for row in seeds[::-1]])
    assert torch.equal(backwards.flip(0, 1), expected)


def test_temperature_0_is_greedy(transformer: DalleTransformer) -> None:
    text = _text(transformer, 1)
    tokens = generate(transformer, text, seeds=[[1, 2]], config=SamplingConfig(temperature=0))
    assert torch.equal(tokens[0, 0], tokens[0, 1])
    with torch.inference_mode():
        logits = transformer(text, tokens[:, 0].flatten(1))[1]
    assert torch.equal(logits.argmax(-1), tokens[:, 0].flatten(1))


def test_each_position_has_its_temperature(transformer: DalleTransformer) -> None:
    text, seeds = _text(transformer, 1), [list(range(8))]
    greedy = generate(transformer, text, seeds=seeds, config=SamplingConfig(temperature=0))
    mixed = generate(transformer, text, seeds=seeds, config=SamplingConfig(temperature=(0.0, 5.0, 5.0)))
    assert torch.equal(mixed[:, :, 0], greedy[:, :, 0])
    assert len({tuple(grid.flatten().tolist()) for grid in mixed[0]}) == 8


def test_guidance_leads_away_from_the_negative_text(transformer: DalleTransformer) -> None:
    text, config = _text(transformer, 2), SamplingConfig(guidance_scale=2.0)
    empty = transformer.empty_text()
    expected = generate(transformer, text, seeds=[[1], [2]], config=config)
    assert torch.equal(generate(transformer, text, seeds=[[1], [2]], config=config, negative=empty), expected)
    other = generate(transformer, text, seeds=[[1], [2]], config=config, negative=text[:1])
    # Led away from itself, a text is where it was.
    assert torch.equal(other[0], generate(transformer, text[:1], seeds=[[1]])[0])
    assert not torch.equal(other[1], expected[1])
    with pytest.raises(ValueError, match="a negative prompt needs a guidance_scale other than 1"):
        generate(transformer, text, seeds=[[1], [2]], negative=empty)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_given_tokens_stay_and_the_rest_follows_from_them(transformer: DalleTransformer, guidance_scale: float) -> None:
    text, config = _text(transformer, 2), SamplingConfig(guidance_scale=guidance_scale)
    seeds = [[1, 2, 3], [4, 5, 6]]
    free = generate(transformer, text, seeds=seeds, config=config)
    given = torch.full((2, 3, 4), -1)
    given[0, 1, 2], given[1, 0, :] = 7, torch.tensor([1, 2, 3, 4])
    tokens = generate(transformer, text, seeds=seeds, config=config, given=given, batch_size=2)
    fixed = (given >= 0)[:, None].expand_as(tokens)
    assert torch.equal(tokens[fixed], given[:, None].expand_as(tokens)[fixed])
    # Before the first given token nothing is different.
    assert torch.equal(tokens[0].flatten(1)[:, :6], free[0].flatten(1)[:, :6])
    # What was drawn is what is drawn if all before it is given.
    everything = tokens[:, 0].clone()
    everything[:, 2, 1:] = -1
    again = generate(transformer, text, seeds=[row[:1] for row in seeds], config=config, given=everything)
    assert torch.equal(again[:, 0], tokens[:, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((1, 4, 3), -1), r"must have shape \(prompts, height, width\) = \(1, 3, 4\), got \(1, 4, 3\)"),
        (torch.full((2, 3, 4), -1), r"must have shape .*, got \(2, 3, 4\)"),
        (torch.full((1, 3, 4), 32), r"must be -1 or in \[0, 32\), got 32 to 32"),
        (torch.full((1, 3, 4), -5), r"must be -1 or in \[0, 32\), got -5 to -5"),
    ],
)
def test_given_tokens_that_do_not_fit_are_refused(transformer: DalleTransformer, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(transformer, _text(transformer, 1), seeds=[[1]], given=given)


def test_tokens_have_the_shape_and_range_of_the_grid(transformer: DalleTransformer) -> None:
    tokens = generate(transformer, _text(transformer, 2), seeds=[[1, 2, 3]] * 2)
    assert tokens.shape == (2, 3, 3, 4)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 32


def test_grid_of_one_token_is_drawn_from_the_text_alone(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(grid_height=1, grid_width=1)
    assert generate(transformer, _text(transformer, 1), seeds=[[0]]).shape == (1, 1, 1, 1)


def test_each_prompt_is_prefilled_once_also_across_batches(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = make_transformer()
    sizes: list[int] = []
    prefill = Decoder.prefill

    def count(self: Decoder, text: Tensor) -> TextStates:
        sizes.append(len(text))
        return prefill(self, text)

    monkeypatch.setattr(Decoder, "prefill", count)
    generate(transformer, _text(transformer, 3), seeds=[[1, 2, 3, 4, 5]] * 3, batch_size=2)
    assert sizes == [1, 1, 1]


def test_draw_codes_gives_each_code_its_share_of_the_unit_interval() -> None:
    probs = torch.tensor([0.1, 0.0, 0.5, 0.4], dtype=torch.float64)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    codes = draw_codes(probs.log().expand(1000, 4), uniforms)
    assert torch.bincount(codes, minlength=4).tolist() == [100, 0, 500, 400]
    assert torch.equal(codes, codes.sort().values), "codes are in ascending order"


def test_draw_codes_at_the_ends_of_the_interval_finds_possible_codes() -> None:
    impossible = float("-inf")
    logits = torch.tensor([[impossible, 0.3, impossible, -0.2, impossible]] * 2, dtype=torch.float64)
    assert draw_codes(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 3]


def test_blocks_come_as_they_get_done_and_fill_up_while_they_are_decoded(transformer: DalleTransformer) -> None:
    seen, texts, seeds = [], _text(transformer, 3), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]

    def look(block: Block, positions: int) -> None:
        sampled = block.image_tokens.flatten(2) >= 0
        assert torch.equal(sampled, (torch.arange(12) < positions).expand_as(sampled))
        seen.append(positions)

    blocks = list(Sampler(transformer).blocks(texts, seeds=seeds, batch_size=2, on_step=look))
    assert [(block.prompts, block.candidates) for block in blocks] == [
        (range(prompt, prompt + 1), candidates) for prompt in range(3) for candidates in (range(2), range(2, 3))
    ]
    assert seen == [*range(1, 13)] * 6
    wide = list(Sampler(transformer).blocks(texts, seeds=seeds, batch_size=6))
    assert [(block.prompts, block.candidates) for block in wide] == [(range(2), range(3)), (range(2, 3), range(3))]
    expected = generate(transformer, texts, seeds=seeds)
    assert torch.equal(torch.cat([block.image_tokens for block in wide]), expected)


def test_seeds_of_candidates_are_fixed_for_ever() -> None:
    assert candidate_seeds(0, "a red circle", 3) == [3285112021, 558340729, 3252921926]


def test_seeds_of_candidates_do_not_depend_on_their_number() -> None:
    assert candidate_seeds(5, "a", 3) == candidate_seeds(5, "a", 9)[:3]


def test_seeds_differ_by_seed_prompt_and_candidate() -> None:
    seeds = [seed for key in (0, 1) for prompt in ("a", "b") for seed in candidate_seeds(key, prompt, 50)]
    assert len(set(seeds)) == 200


@pytest.mark.parametrize("seeds", [[], [[1]], [[1], [2, 3]], [[], []], [[1], [2], [3]]])
def test_seeds_that_do_not_fit_the_prompts_are_refused(transformer: DalleTransformer, seeds: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"seeds must be 2 lists of one same length >= 1, got lengths \["):
        generate(transformer, _text(transformer, 2), seeds=seeds)


def test_batch_size_0_is_refused(transformer: DalleTransformer) -> None:
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        generate(transformer, _text(transformer, 1), seeds=[[1]], batch_size=0)
