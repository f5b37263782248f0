"""Prompts to pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle1.checkpoint import load_clip, load_image_tokenizer, load_transformer
from dalle1.models.dvae import DVAE
from dalle1.pipeline import Pipeline, choose_device, choose_dtype
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.sampling.candidate_store import MemoryStore
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.progress import Progress
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig


def _load(checkpoints: dict[str, Path], reranker: CLIPReranker | None = None) -> Pipeline:
    return Pipeline.from_checkpoint(transformer=checkpoints["transformer"], dvae=checkpoints["dvae"], reranker=reranker)


@pytest.fixture(scope="module")
def pipeline(checkpoints: dict[str, Path]) -> Pipeline:
    return _load(checkpoints)


@pytest.fixture(scope="module")
def ranking_pipeline(checkpoints: dict[str, Path]) -> Pipeline:
    return _load(checkpoints, CLIPReranker.load(checkpoints["clip"]))


def test_result_holds_the_pictures_of_each_prompt(pipeline: Pipeline) -> None:
    results = pipeline(["a red circle", "  a blue square\n"], candidates=3)
    assert [result.prompt for result in results] == ["a red circle", "a blue square"]
    for result in results:
        assert result.images.shape == (3, 3, 12, 16)
        assert result.images.dtype == torch.float32
        assert 0 <= result.images.min() <= result.images.max() <= 1
        assert result.image_tokens.shape == (3, 3, 4)
        assert (result.candidates, result.sampled) == ([0, 1, 2], 3)
        assert result.scores is None
        torch.testing.assert_close(result.images, pipeline.image_tokenizer.decode(result.image_tokens))


def test_pictures_do_not_depend_on_other_prompts_candidates_or_batches(pipeline: Pipeline) -> None:
    alone = pipeline(["a red circle"], candidates=2)[0]
    among = pipeline(["x", "a red circle", "y"], candidates=5, batch_size=4)[1]
    assert torch.equal(among.image_tokens[:2], alone.image_tokens)
    assert torch.equal(among.images[:2], alone.images)


def test_another_seed_or_prompt_gives_other_pictures(pipeline: Pipeline) -> None:
    tokens = [pipeline([prompt], seed=seed)[0].image_tokens for prompt, seed in (("a", 0), ("a", 1), ("b", 0))]
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_sampling_settings_are_used(pipeline: Pipeline) -> None:
    result = pipeline(["a"], candidates=4, sampling=SamplingConfig(top_k=1))[0]
    assert (result.image_tokens == result.image_tokens[0]).all(), "with one possible code all candidates are equal"


def test_guidance_needs_a_transformer_that_was_trained_for_it(pipeline: Pipeline) -> None:
    guided = SamplingConfig(guidance_scale=3)
    with pytest.raises(ValueError, match=r"guidance needs .* optim\.caption_dropout > 0"):
        pipeline(["a"], sampling=guided)
    assert pipeline.default_guidance_scale == 1

    trained = replace(pipeline.transformer, caption_dropout=0.1)
    able = Pipeline(trained, pipeline.image_tokenizer)
    assert able.default_guidance_scale > 1
    prompt = ["two green stars"]
    tokens = [
        pipe(prompt, candidates=9, sampling=how)[0].image_tokens
        for pipe, how in ((able, guided), (pipeline, SamplingConfig()))
    ]
    assert not torch.equal(*tokens)


def test_negative_prompt_takes_the_place_of_no_caption(pipeline: Pipeline) -> None:
    able = Pipeline(replace(pipeline.transformer, caption_dropout=0.1), pipeline.image_tokenizer)
    guided, prompt = SamplingConfig(guidance_scale=20), ["two green stars"]
    plain, negative, itself = (
        able(prompt, candidates=9, sampling=guided, negative_prompt=text)[0].image_tokens
        for text in (None, "a red circle", "two green stars")
    )
    assert not torch.equal(negative, plain)
    assert torch.equal(itself, pipeline(prompt, candidates=9)[0].image_tokens)
    with pytest.raises(ValueError, match="a negative prompt needs a guidance_scale other than 1"):
        able(prompt, negative_prompt="a red circle")
    with pytest.raises(ValueError, match="negative_prompt must not be empty"):
        able(prompt, sampling=guided, negative_prompt=" ")


def test_candidates_are_sorted_by_their_score(ranking_pipeline: Pipeline, pipeline: Pipeline) -> None:
    ranked = ranking_pipeline(["a red circle"], candidates=6)[0]
    unranked = pipeline(["a red circle"], candidates=6)[0]
    assert ranked.scores == sorted(ranked.scores or [], reverse=True)
    assert ranked.candidates != unranked.candidates
    for candidate, image, score in zip(ranked.candidates, ranked.images, ranked.scores or [], strict=True):
        assert torch.equal(image, unranked.images[candidate])
        assert ranking_pipeline.reranker is not None
        again = ranking_pipeline.reranker.score("a red circle", image[None], torch.zeros(1, 3, 4))
        assert score == pytest.approx(again.item(), abs=1e-5)


def test_only_the_best_are_kept(ranking_pipeline: Pipeline, pipeline: Pipeline) -> None:
    everything = ranking_pipeline(["a red circle"], candidates=7)[0]
    best = ranking_pipeline(["a red circle"], candidates=7, keep=3)[0]
    assert best.scores == (everything.scores or [])[:3]
    assert best.candidates == everything.candidates[:3]
    assert torch.equal(best.images, everything.images[:3])
    assert torch.equal(best.image_tokens, everything.image_tokens[:3])
    assert best.sampled == 7
    assert pipeline(["a red circle"], candidates=7, keep=3)[0].candidates == [0, 1, 2]


@pytest.mark.parametrize("batch_size", [2, 100])
def test_what_is_in_the_store_is_not_sampled_again(pipeline: Pipeline, batch_size: int) -> None:
    prompts, store, seen = ["a", "b", "c"], MemoryStore(), list[Progress]()
    expected = pipeline(prompts, candidates=5)
    for prompt, known in ((0, 5), (1, 2)):
        store.save(prompt, expected[prompt].image_tokens[:known])
    results = pipeline.stream(prompts, candidates=5, batch_size=batch_size, store=store, on_progress=seen.append)
    for result, whole in zip(results, expected, strict=True):
        assert torch.equal(result.image_tokens, whole.image_tokens)
        assert torch.equal(result.images, whole.images)
    assert (seen[0].tokens_known, seen[0].tokens, seen[0].candidates) == (7 * 12, 15 * 12, 15)
    assert (seen[-1].tokens_done, seen[-1].candidates_done) == (15 * 12, 15)
    assert [progress.tokens_done for progress in seen] == sorted(progress.tokens_done for progress in seen)
    assert {progress.block.prompts.start for progress in seen} == {0}, "of its group"
    fewer = pipeline(prompts, candidates=3, store=store)
    assert torch.equal(fewer[2].image_tokens, expected[2].image_tokens[:3])


def test_another_process_may_fill_the_same_store(pipeline: Pipeline) -> None:
    expected = pipeline(["a"], candidates=6)[0].image_tokens
    store = MemoryStore()

    def other(progress: Progress) -> None:
        # Ahead of this one, in batches of other sizes.
        done = progress.tokens_done // 12
        if progress.tokens_done % 12 == 0 and done < 5:
            store.save(0, expected[: done + 1])

    result = pipeline(["a"], candidates=6, batch_size=2, store=store, on_progress=other)[0]
    assert torch.equal(result.image_tokens, expected)
    # One that begins with some, and finds more when it comes to them.
    store.save(0, expected[:1])
    results = pipeline.stream(["a"], candidates=6, batch_size=2, store=store, on_progress=other)
    assert torch.equal(next(results).image_tokens, expected)


def test_decoding_of_pictures_is_counted_over_all_prompts(
    ranking_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = ranking_pipeline(["a", "b"], candidates=5), list[int]()
    monkeypatch.setattr("dalle1.decode_and_rank._RANKED_AT_ONCE", 2)
    parts = ranking_pipeline(["a", "b"], candidates=5, on_finished=seen.append)
    assert seen == [*range(1, 11)]
    for one, other in zip(whole, parts, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-6)
        assert torch.equal(one.images, other.images)


def test_best_are_the_same_however_many_are_ranked_at_once(
    ranking_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ranking_pipeline(["a red circle"], candidates=9, keep=4)[0]
    monkeypatch.setattr("dalle1.decode_and_rank._RANKED_AT_ONCE", 2)
    parts = ranking_pipeline(["a red circle"], candidates=9, keep=4)[0]
    assert parts.candidates == whole.candidates
    assert torch.equal(parts.images, whole.images)


def test_scores_that_are_no_numbers_are_refused(pipeline: Pipeline) -> None:
    class Broken(CLIPReranker):
        def __init__(self) -> None: ...

        def check(self, prompt: str) -> None: ...

        def score(self, prompt: str, images: Tensor, image_tokens: Tensor) -> Tensor:
            return torch.tensor([0.5, float("nan")])

    broken = Pipeline(pipeline.transformer, pipeline.image_tokenizer, Broken())
    with pytest.raises(ValueError, match="scores must be finite numbers, some of 'a' are not"):
        broken(["a"], candidates=2)


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(top_k=3), SamplingConfig(top_p=0.5)])
def test_weights_that_are_no_numbers_are_told(pipeline: Pipeline, sampling: SamplingConfig) -> None:
    damaged = copy.deepcopy(pipeline.transformer)
    damaged.model.blocks[1].mlp[0].weight.data[3] = float("nan")  # type: ignore[index, union-attr, operator]
    with pytest.raises(ValueError, match="logits must be finite numbers, they are not in float32"):
        Pipeline(damaged, pipeline.image_tokenizer)(["a"], candidates=2, sampling=sampling)


def test_results_come_as_they_get_done(pipeline: Pipeline) -> None:
    seen: list[Progress] = []
    results = pipeline.stream(["a", "b"], candidates=2, batch_size=1, on_progress=seen.append)
    assert (next(results).prompt, seen[-1].candidates_done) == ("a", 2)
    assert (next(results).prompt, seen[-1].candidates_done) == ("b", 4)


def test_rows_of_a_picture_stay_token_by_token(pipeline: Pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    image_prompt = pipeline.image_prompt(picture, keep_rows=2)
    assert image_prompt.image.shape == (3, 12, 16)
    result = pipeline(["a", "b"], candidates=4, image_prompt=image_prompt)[1]
    assert torch.equal(result.image_tokens[:, :2], image_prompt.image_tokens[:2].expand(4, -1, -1))
    assert len({tuple(grid[2].tolist()) for grid in result.image_tokens}) > 1
    expected = pipeline.image_tokenizer.encode(image_prompt.image[None])
    assert torch.equal(image_prompt.image_tokens, expected[0])
    torch.testing.assert_close(result.images, pipeline.image_tokenizer.decode(result.image_tokens))


def test_masked_picture_keeps_its_pixels_if_asked_to(pipeline: Pipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 12))
    mask.putpixel((5, 6), 255)  # in the second cell of the second row
    image_prompt = pipeline.image_prompt(picture, mask=mask, paste_kept=True)
    result = pipeline(["a"], candidates=9, image_prompt=image_prompt)[0]
    again = torch.zeros(3, 4, dtype=torch.bool)
    again[1, 1] = True
    assert torch.equal(result.image_tokens[:, ~again], image_prompt.image_tokens[~again].expand(9, -1))
    assert len(result.image_tokens[:, 1, 1].unique()) > 1
    pixels = again.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(result.images[..., ~pixels], image_prompt.image[:, ~pixels].expand(9, -1, -1))
    decoded = pipeline.image_tokenizer.decode(result.image_tokens)
    torch.testing.assert_close(result.images[..., pixels], decoded[..., pixels])


@pytest.mark.parametrize("options", [{}, {"keep_rows": 1, "mask": Image.new("L", (16, 12))}])
def test_image_needs_either_rows_or_a_mask(pipeline: Pipeline, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"an image needs either keep_rows=.* or mask=.* got (neither|both)"):
        pipeline.image_prompt(Image.new("RGB", (16, 12)), **options)


def test_checkpoints_name_the_weights(ranking_pipeline: Pipeline, pipeline: Pipeline) -> None:
    assert set(pipeline.checkpoints) == {"transformer", "dvae"}
    assert ranking_pipeline.reranker is not None
    assert ranking_pipeline.reranker.facts["kind"] == "clip"
    assert ranking_pipeline.checkpoints["dvae"]["sha256"] == ranking_pipeline.transformer.dvae_sha256
    assert ranking_pipeline.checkpoints["transformer"]["step"] == 7


def test_longest_prompt_is_accepted_and_one_token_more_is_not(pipeline: Pipeline) -> None:
    pipeline(["z" * 40])
    with pytest.raises(ValueError, match=r"prompt must have at most 40 tokens, .*, got 41; shorten 'z{41}'"):
        pipeline(["a", "z" * 41])


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([""], {}, ValueError, "prompt must not be empty"),
        (["a", " \n"], {}, ValueError, "prompt must not be empty"),
        ([], {}, ValueError, "prompts must hold at least one prompt, got none"),
        ("a red circle", {}, TypeError, "prompts must be a list of texts, got the text 'a red circle'"),
        ([3], {}, TypeError, "prompt must be a text, got 3"),
        (["a \udcff"], {}, ValueError, r"prompt must be valid Unicode, got 'a \\udcff'"),
        (["a"], {"candidates": 0}, ValueError, "candidates must be >= 1, got 0"),
        (["a"], {"candidates": "many"}, TypeError, "candidates must be an integer >= 1, got 'many'"),
        (["a"], {"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        (["a"], {"batch_size": "some"}, TypeError, "batch_size must be an integer >= 1, got 'some'"),
        (["a"], {"keep": 0}, ValueError, "keep must be >= 1, got 0"),
        (["a"], {"seed": 0.5}, TypeError, "seed must be an integer >= 0, got 0.5"),
    ],
)
def test_wrong_arguments_are_refused(
    pipeline: Pipeline, prompts: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipeline(prompts, **options)


def test_prompt_too_long_for_the_clip_is_refused_before_sampling(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = load_clip(checkpoints["clip"])
    short = TextTokenizer.train(["a"], TextTokenizerConfig(vocab_size=256, seq_len=4))
    transformer = load_transformer(checkpoints["transformer"])
    pipeline = Pipeline(
        transformer, load_image_tokenizer(checkpoints["dvae"]), CLIPReranker(replace(clip, text_tokenizer=short))
    )
    monkeypatch.setattr("dalle1.pipeline.Sampler", None)
    with pytest.raises(ValueError, match="prompt must have at most 4 tokens, as the CLIP was trained with, got 5"):
        pipeline(["abcde"])


def test_dvae_of_another_transformer_is_refused(
    tmp_path: Path,
    checkpoints: dict[str, Path],
    make_dvae: Callable[..., DVAE],
    write_checkpoint: Callable[..., Path],
) -> None:
    other = write_checkpoint(tmp_path / "other.ckpt", make_dvae(seed=5))
    with pytest.raises(ValueError, match="the transformer needs the dVAE it was trained with"):
        Pipeline.from_checkpoint(transformer=checkpoints["transformer"], dvae=other)


def test_transformer_without_a_text_tokenizer_is_refused(checkpoints: dict[str, Path]) -> None:
    transformer = replace(load_transformer(checkpoints["transformer"]), text_tokenizer=None)
    with pytest.raises(ValueError, match="the transformer checkpoint must hold a text tokenizer, it has none"):
        Pipeline(transformer, load_image_tokenizer(checkpoints["dvae"]))


def test_decoding_in_bf16_is_asked_for_by_name(pipeline: Pipeline) -> None:
    cpu = torch.device("cpu")
    assert [choose_dtype(name, cpu) for name in ("auto", "fp32", "bf16")] == [*[torch.float32] * 2, torch.bfloat16]
    with pytest.raises(ValueError, match="precision must be one of auto, fp32, bf16, fp16, got 'fp8'"):
        choose_dtype("fp8", cpu)
    exact = pipeline(["a"], candidates=8)[0].image_tokens
    rounded = pipeline(["a"], candidates=8, dtype=torch.bfloat16)[0].image_tokens
    assert not torch.equal(exact, rounded)
    assert (exact[:, 0] == rounded[:, 0]).float().mean() > 0.8, "the same but for rounding, until tokens differ"


def test_compiled_decoding_is_for_cuda(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="compiled decoding is for CUDA, got device cpu; leave out compile"):
        pipeline(["a"], compiled=True)


def test_device_auto_is_one_that_works() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device must be auto or one that PyTorch can use here, got 'toaster'"):
        choose_device("toaster")
