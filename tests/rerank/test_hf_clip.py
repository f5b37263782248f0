"""Scores of CLIP and SigLIP models in the format of transformers, against that library's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import (
    KINDS,
    N_POSITIONS,
    N_SIGLIP_POSITIONS,
    PROMPT,
    SIZES,
    edit_json,
    library_pixels,
    make_images,
    save_model,
    score,
    write_json,
)
from torch import Tensor

from dalle1.rerank import hf_clip
from dalle1.rerank.hf_clip import HFCLIPReranker

pytestmark = pytest.mark.usefixtures("no_network")


@torch.no_grad()
def library_scores(directory: Path, kind: str, images: Tensor) -> Tensor:
    """With the library's tokenizer, picture processor and model."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    # Its own class for SigLIP 2 makes letters small; the one that released files name does not.
    prompt = PROMPT.lower() if kind == "siglip2" else PROMPT
    padding = True if kind == "clip" else "max_length"
    text = tokenizer([prompt], padding=padding, max_length=tokenizer.model_max_length, return_tensors="pt")
    network = (transformers.CLIPModel if kind == "clip" else transformers.SiglipModel).from_pretrained(directory)
    output = network.eval()(**text, pixel_values=library_pixels(directory, images))
    return torch.cosine_similarity(output.image_embeds, output.text_embeds)


@pytest.mark.usefixtures("quiet_library", "across_then_down")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_library(
    rerankers: dict[str, HFCLIPReranker], models: Callable[[str], Path], kind: str, size: tuple[int, int]
) -> None:
    images = make_images(6, *size)
    expected = library_scores(models(kind), kind, images)
    scores = score(rerankers[kind], images)
    assert expected.max() - expected.min() > 0.03, "too alike to test anything"
    torch.testing.assert_close(scores, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_a_cosine_of_its_picture_alone(
    rerankers: dict[str, HFCLIPReranker], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    images = make_images(5, 40, 48)
    scores = score(rerankers[kind], images)
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert scores.device.type == "cpu"
    assert not scores.requires_grad
    assert scores.abs().max() <= 1
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(score(rerankers[kind], images[order]), scores[order])
    monkeypatch.setattr(hf_clip, "_BATCH_SIZE", 2)
    torch.testing.assert_close(score(rerankers[kind], images), scores)


def test_prompts_differ_and_siglip_sees_no_capitals(rerankers: dict[str, HFCLIPReranker]) -> None:
    images = make_images(4, 32, 32)
    for reranker in rerankers.values():
        assert not torch.allclose(score(reranker, images), score(reranker, images, "two green stars"))
        torch.testing.assert_close(score(reranker, images, "A RED box"), score(reranker, images, "a red box"))
    # The first one's tokenizer has no punctuation.
    torch.testing.assert_close(
        score(rerankers["siglip"], images, "a red, (box)!"), score(rerankers["siglip"], images, "a red box")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_too_long_is_refused(rerankers: dict[str, HFCLIPReranker], kind: str) -> None:
    reranker, image = rerankers[kind], make_images(1, 32, 32)
    limit = N_POSITIONS if kind == "clip" else N_SIGLIP_POSITIONS
    message = rf"at most {limit} tokens to be scored by '.*', it has \d+; shorten it or set rerank=none$"
    reranker.check("")
    score(reranker, image, "")
    for refuse in (reranker.check, lambda prompt: score(reranker, image, prompt)):
        with pytest.raises(ValueError, match=message):
            refuse("z" * 99 + " e" * 99)


def test_the_longest_prompt_fits(rerankers: dict[str, HFCLIPReranker]) -> None:
    longest = "e" * (N_POSITIONS - 2)  # start and end are the other two
    rerankers["clip"].check(longest)
    score(rerankers["clip"], make_images(1, 32, 32), longest)
    with pytest.raises(ValueError, match=rf"at most {N_POSITIONS} tokens .*, it has {N_POSITIONS + 1};"):
        rerankers["clip"].check(longest + "e")


@pytest.mark.parametrize("kind", KINDS)
def test_facts_identify_the_model(
    rerankers: dict[str, HFCLIPReranker], models: Callable[[str], Path], kind: str
) -> None:
    directory = models(kind)
    assert rerankers[kind].facts == {
        "kind": "hf_clip",
        "model": str(directory),
        "model_type": "clip" if kind == "clip" else "siglip",
        "weights_sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
    }
    json.dumps(rerankers[kind].facts)


def test_moving_it_keeps_the_scores(rerankers: dict[str, HFCLIPReranker]) -> None:
    images = make_images(2, 32, 32)
    before = score(rerankers["clip"], images)
    rerankers["clip"].to(torch.device("cpu"))
    assert torch.equal(score(rerankers["clip"], images), before)


def test_it_says_nothing(models: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as library

    before = library.get_verbosity(), library.is_progress_bar_enabled()
    for kind in KINDS:
        score(HFCLIPReranker.load(models(kind)), make_images(1, 32, 32))
    assert capfd.readouterr() == ("", "")
    assert (library.get_verbosity(), library.is_progress_bar_enabled()) == before


@pytest.mark.usefixtures("quiet_library")
def test_weights_may_be_in_parts(copy: Callable[[str], Path]) -> None:
    from transformers import CLIPModel

    directory = copy("clip")
    images = make_images(2, 32, 32)
    expected = score(HFCLIPReranker.load(directory), images)
    network = CLIPModel.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    network.save_pretrained(directory, max_shard_size="60KB")
    reranker = HFCLIPReranker.load(directory)
    parts = sorted(directory.glob("model-*.safetensors"))
    assert len(parts) > 1
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    assert reranker.facts["weights_sha256"] == digest
    torch.testing.assert_close(score(reranker, images), expected)
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match="must have weights as safetensors"):
        HFCLIPReranker.load(directory)


@pytest.mark.usefixtures("quiet_library")
def test_a_tokenizer_may_be_in_two_files(copy: Callable[[str], Path], rerankers: dict[str, HFCLIPReranker]) -> None:
    directory = copy("clip")
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    write_json(directory / "vocab.json", model["vocab"])
    merges = (" ".join(merge) for merge in model["merges"])
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    images = make_images(2, 32, 32)
    torch.testing.assert_close(score(HFCLIPReranker.load(directory), images), score(rerankers["clip"], images))


@pytest.mark.usefixtures("quiet_library")
def test_the_first_releases_of_clip_name_another_end_token(
    tmp_path: Path, rerankers: dict[str, HFCLIPReranker]
) -> None:
    directory = tmp_path / "old"
    save_model(directory, "clip", bos_token_id=0, eos_token_id=2)
    images = make_images(2, 32, 32)
    torch.testing.assert_close(score(HFCLIPReranker.load(directory), images), score(rerankers["clip"], images))


def test_no_code_of_a_model_is_run(copy: Callable[[str], Path], rerankers: dict[str, HFCLIPReranker]) -> None:
    directory = copy("clip")
    (directory / "evil.py").write_text(f"open({str(directory / 'was_run')!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor")
        edit_json(directory / name, auto_map=dict.fromkeys(kinds, "evil.Evil"))
    images = make_images(2, 32, 32)
    torch.testing.assert_close(score(HFCLIPReranker.load(directory), images), score(rerankers["clip"], images))
    assert not (directory / "was_run").exists()
