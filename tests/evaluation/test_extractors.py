"""Extractors: what they see, what they are called, and what is said of files that are something else."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle1.checkpoint import load_clip
from dalle1.data.transforms import to_pixels
from dalle1.evaluation.extractors import InceptionExtractor, load_extractor

CLIP_PICTURES = {
    "crop_size": {"height": 16, "width": 16},
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": {"shortest_edge": 18},
}


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    """uint8 pictures of (height, width)."""
    numbers = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=numbers, dtype=torch.uint8) for size in sizes]


@pytest.fixture(scope="session")
def dino_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    from dalle1.rerank.hf_files import quiet_transformers

    directory = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    with quiet_transformers():
        Dinov2Model(config).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(CLIP_PICTURES))
    return directory


def test_inception_sees_what_pillow_resizes_to_299_pixels(inception_files: dict[str, Path]) -> None:
    extractor = load_extractor(f"inception:{inception_files['probabilities']}")
    given = pictures((14, 20), (400, 310))
    result = extractor(given)
    assert result.features.shape == (2, 12)
    assert extractor.n_features == 12
    assert extractor.has_classes
    for features, picture in zip(result.features, given, strict=True):
        resized = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BILINEAR)
        expected = torch.nn.functional.adaptive_avg_pool2d(to_pixels(resized).float() / 255, [2, 2]).flatten()
        # A few values are rounded to the next level.
        assert torch.allclose(features, expected, atol=2e-4)


def test_inception_that_resizes_by_itself_gets_pictures_as_they_are(inception_files: dict[str, Path]) -> None:
    extractor = load_extractor(f"inception:{inception_files['resizing']}")
    sha256 = hashlib.sha256(inception_files["resizing"].read_bytes()).hexdigest()
    assert extractor.name == f"inception-unresized-{sha256[:8]}"
    assert extractor.facts["resized_by"] == "the file itself"
    given = pictures((14, 20), (14, 20), (400, 310), (299, 299), (14, 20))
    result = extractor(given)
    assert result.probabilities is not None
    for features, probabilities, picture in zip(result.features, result.probabilities, given, strict=True):
        # TensorFlow's pixel i of 299 is at i * length / 299 of the picture, without halves.
        rows, cols = (torch.arange(299) * side / 299 for side in picture.shape[1:])
        expected = torch.nn.functional.adaptive_avg_pool2d(bilinear(picture, rows, cols)[None] / 255, [2, 2]).flatten()
        assert torch.allclose(features, expected, atol=1e-4)
        assert float(probabilities.sum()) == pytest.approx(1)
    resized = load_extractor(f"inception:{inception_files['probabilities']}")(given).features
    # The two ways see the same in 299 x 299 pixels, and only there.
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(result.features, resized, strict=True)]
    assert same == [False, False, False, True, False]


def bilinear(picture: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The picture at these places, whose last pixels go on."""
    values = picture.double()
    for axis, places in ((1, rows), (2, cols)):
        below = places.long()
        above = (below + 1).clamp(max=values.shape[axis] - 1)
        shape = [1, 1, 1]
        shape[axis] = -1
        share = (places - below).double().view(shape)
        values = values.index_select(axis, below) * (1 - share) + values.index_select(axis, above) * share
    return values.float()


@pytest.mark.parametrize("kind", ["probabilities", "convolutional"])
def test_inception_that_does_not_resize_gets_299_pixels(kind: str, inception_files: dict[str, Path]) -> None:
    extractor = load_extractor(f"inception:{inception_files[kind]}")
    assert "unresized" not in extractor.name
    assert extractor.facts["resized_by"] == "bilinear with antialias, before it"
    (picture,) = pictures((14, 20))
    resized = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BILINEAR)
    seen = extractor([picture]).features
    assert torch.allclose(seen, extractor([to_pixels(resized).contiguous()]).features, atol=2e-3)


def test_inception_classes_are_probabilities_without_the_output_bias(inception_files: dict[str, Path]) -> None:
    given = pictures((14, 20), (14, 20))
    results = {
        kind: load_extractor(f"inception:{inception_files[kind]}")(given) for kind in ("probabilities", "logits")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        weight = torch.jit.load(str(inception_files["logits"])).classes.weight  # the same seed as the other's
    for result in results.values():
        assert result.probabilities is not None
        expected = (result.features @ weight.detach().T).softmax(1)
        assert torch.allclose(result.probabilities, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["probabilities", "resizing"])
def test_inception_runs_once_where_nobody_wants_classes(
    kind: str, inception_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"inception:{inception_files[kind]}"
    both, features_alone = load_extractor(place), load_extractor(place, classes=False)
    given = pictures((14, 20), (14, 20), (9, 30))
    expected = both(given)
    monkeypatch.setattr(InceptionExtractor, "_classes", None)
    result = features_alone(given)
    assert torch.equal(result.features, expected.features)
    assert (result.probabilities, features_alone.has_classes) == (None, False)
    assert both.name == features_alone.name


def test_names_have_a_hash_of_the_content(
    inception_files: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    first = load_extractor(f"inception:{inception_files['logits']}").name
    copy = tmp_path / "other-name.pt"
    copy.write_bytes(inception_files["logits"].read_bytes())
    assert load_extractor(f"inception:{copy}").name == first
    assert load_extractor(f"inception:{inception_files['probabilities']}").name != first
    assert load_extractor(f"clip:{checkpoints['clip']}").name == f"clip-{load_clip(checkpoints['clip']).sha256[:8]}"


def test_clip_features_have_the_cosines_of_the_reranker(checkpoints: dict[str, Path]) -> None:
    from dalle1.rerank.own_clip import CLIPReranker

    extractor = load_extractor(f"clip:{checkpoints['clip']}")
    given = pictures((12, 16), (12, 16), (33, 15), (16, 16))
    features = torch.nn.functional.normalize(extractor(given).features, dim=1)
    cosines = features @ extractor.text_features(["a red circle"])[0]
    reranker = CLIPReranker.load(checkpoints["clip"])
    expected = [reranker.score("a red circle", picture[None] / 255, torch.zeros(1, 3, 4)) for picture in given]
    assert torch.allclose(cosines, torch.cat(expected), atol=1e-5)
    # They come with their own lengths, which the distances see.
    assert not torch.allclose(extractor(given).features.norm(dim=1), torch.ones(4))


def test_dino_features_are_those_of_the_library_on_its_own_preprocessing(dino_directory: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Model

    extractor = load_extractor(f"hf:{dino_directory}")
    assert extractor.name.startswith("hf-dinov2-")
    assert (extractor.n_features, extractor.has_classes, extractor.reads_text) == (24, False, False)
    given = pictures((20, 31), (40, 25))
    network = Dinov2Model.from_pretrained(dino_directory).eval()
    processor = BitImageProcessorPil.from_pretrained(dino_directory)
    images = [Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())) for picture in given]
    with torch.inference_mode():
        expected = network(**processor(images, return_tensors="pt")).pooler_output
    assert torch.allclose(extractor(given).features, expected, atol=2e-3)
    with pytest.raises(TypeError, match="reads no captions"):
        extractor.text_features(["a red circle"])


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("vgg:file.pt", "must be inception:FILE, clip:CHECKPOINT or hf:NAME_OR_DIRECTORY, got 'vgg:file.pt'"),
        ("inception:", "got 'inception:'"),
        ("inception:nowhere.pt", "no Inception file at 'nowhere.pt'"),
        ("inception:{other}", "must be called as forward"),
        ("inception:{text}", "must be a TorchScript file, it cannot be read as one"),
        ("inception:hf://somebody/some-file", r"must be hf://OWNER/REPO/FILE"),
        ("inception:hf://somebody/some-repo/file.pt", "local cache of the Hugging Face hub; give --allow_download"),
        ("hf:{empty}", "it has no config.json"),
        ("clip:nowhere.ckpt", "no clip at 'nowhere.ckpt'"),
        ("clip:{dvae}", "must hold a clip, got a dvae"),
    ],
)  # fmt: skip
def test_what_is_no_extractor_is_refused_in_one_sentence(
    specification: str,
    message: str,
    inception_files: dict[str, Path],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no network")
    places = {"other": inception_files["other"], "text": tmp_path / "text.pt", "empty": tmp_path / "empty"}
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_extractor(specification.format(**places, dvae=checkpoints["dvae"]))
    assert "\n" not in str(caught.value)


def test_hub_is_asked_only_if_that_is_allowed(
    inception_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def download(repo_id: str, filename: str, *, local_files_only: bool = False) -> str:
        asked.append(local_files_only)
        assert (repo_id, filename) == ("somebody/some-repo", "folder/file.pt")
        if local_files_only:
            raise FileNotFoundError("not here")
        return str(inception_files["logits"])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    place = "inception:hf://somebody/some-repo/folder/file.pt"
    with pytest.raises(FileNotFoundError, match="allow_download"):
        load_extractor(place)
    assert asked == [True]
    assert (
        load_extractor(place, allow_download=True).name == load_extractor(f"inception:{inception_files['logits']}").name
    )
    assert asked == [True, True, False]
