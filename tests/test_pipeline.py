"""Prompts to pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle1.checkpoint import load_clip, load_image_tokenizer, load_transformer
from dalle1.models.dvae import DVAE
from dalle1.pipeline import Pipeline, choose_device
from dalle1.rerank import score_images
from dalle1.sampling.filters import SamplingConfig
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig


@pytest.fixture(scope="module")
def pipeline(checkpoints: dict[str, Path]) -> Pipeline:
    return Pipeline.from_checkpoints(transformer=checkpoints["transformer"], dvae=checkpoints["dvae"])


@pytest.fixture(scope="module")
def ranking_pipeline(checkpoints: dict[str, Path]) -> Pipeline:
    return Pipeline.from_checkpoints(**checkpoints)


def test_result_holds_the_pictures_of_each_prompt(pipeline: Pipeline) -> None:
    results = pipeline(["a red circle", "  a blue square\n"], candidates=3)
    assert [result.prompt for result in results] == ["a red circle", "a blue square"]
    for result in results:
        assert result.images.shape == (3, 3, 12, 16)
        assert result.images.dtype == torch.float32
        assert 0 <= result.images.min() <= result.images.max() <= 1
        assert result.image_tokens.shape == (3, 3, 4)
        assert len(set(result.seeds)) == 3
        assert result.scores is None
        torch.testing.assert_close(result.images, pipeline.image_tokenizer.decode(result.image_tokens))


def test_pictures_do_not_depend_on_other_prompts_candidates_or_batches(pipeline: Pipeline) -> None:
    alone = pipeline(["a red circle"], candidates=2)[0]
    among = pipeline(["x", "a red circle", "y"], candidates=5, batch_size=4)[1]
    assert among.seeds[:2] == alone.seeds
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
    with pytest.raises(ValueError, match="prompt must not be empty"):
        able(prompt, sampling=guided, negative_prompt=" ")


def test_candidates_are_sorted_by_their_score(ranking_pipeline: Pipeline, pipeline: Pipeline) -> None:
    ranked = ranking_pipeline(["a red circle"], candidates=6)[0]
    unranked = pipeline(["a red circle"], candidates=6)[0]
    assert ranked.scores == sorted(ranked.scores or [], reverse=True)
    assert ranked.seeds != unranked.seeds
    for seed, image, score in zip(ranked.seeds, ranked.images, ranked.scores or [], strict=True):
        assert torch.equal(image, unranked.images[unranked.seeds.index(seed)])
        assert ranking_pipeline.clip is not None
        assert ranking_pipeline.clip.text_tokenizer is not None
        text = ranking_pipeline.clip.text_tokenizer.encode(["a red circle"])[0]
        again = score_images(ranking_pipeline.clip.model, image[None], text)
        assert score == pytest.approx(again.item(), abs=1e-5)


def test_checkpoints_name_the_weights(ranking_pipeline: Pipeline, pipeline: Pipeline) -> None:
    assert set(pipeline.checkpoints) == {"transformer", "dvae"}
    assert set(ranking_pipeline.checkpoints) == {"transformer", "dvae", "clip"}
    assert ranking_pipeline.checkpoints["dvae"]["sha256"] == ranking_pipeline.transformer.dvae_sha256
    assert ranking_pipeline.checkpoints["transformer"]["step"] == 7


def test_longest_prompt_is_accepted_and_one_token_more_is_not(pipeline: Pipeline) -> None:
    pipeline(["z" * 40])
    with pytest.raises(ValueError, match=r"prompt must have at most 40 tokens, .*, got 41: 'z{41}'"):
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
    pipeline = Pipeline(transformer, load_image_tokenizer(checkpoints["dvae"]), replace(clip, text_tokenizer=short))
    monkeypatch.setattr("dalle1.pipeline.generate", None)
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
        Pipeline.from_checkpoints(transformer=checkpoints["transformer"], dvae=other)


def test_transformer_without_a_text_tokenizer_is_refused(checkpoints: dict[str, Path]) -> None:
    transformer = replace(load_transformer(checkpoints["transformer"]), text_tokenizer=None)
    with pytest.raises(ValueError, match="the transformer checkpoint must hold a text tokenizer, it has none"):
        Pipeline(transformer, load_image_tokenizer(checkpoints["dvae"]))


def test_device_auto_is_one_that_works() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device must be auto or one that PyTorch can use here, got 'toaster'"):
        choose_device("toaster")
