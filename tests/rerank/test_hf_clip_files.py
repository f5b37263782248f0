"""Where a model of the reranker is found, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import edit_json, make_images, save_network, score, write_json

from dalle1.rerank import hf_files
from dalle1.rerank.hf_clip import HFCLIPReranker

pytestmark = pytest.mark.usefixtures("no_network")

INSTALL = r"pip install '\.\[hf\]' in the project's directory"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _only_pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _without_tensor(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "visual_projection.weight"}, path, {"format": "pt"})


def _not_finite(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["visual_projection.weight"][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})


def _other_sizes(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 40
    write_json(directory / "config.json", config)


def _other_vocabulary(directory: Path) -> None:
    save_network(directory, "clip", 40)


def _without_end_token(directory: Path) -> None:
    edit_json(directory / "tokenizer.json", post_processor=None)
    edit_json(directory / "tokenizer_config.json", tokenizer_class="TokenizersBackend")


def _pictures(**changes: object) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "preprocessor_config.json", **changes)


def _lacks(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no configuration": (_lacks("config.json"), FileNotFoundError, "has no config.json; correct the path"),
    "damaged configuration": (
        lambda d: _cut(d / "config.json"),
        ValueError,
        "config.json' is no JSON, .* get it again",
    ),
    "no object": (lambda d: write_json(d / "config.json", []), ValueError, "must hold an object, got a list"),
    "another model": (
        lambda d: edit_json(d / "config.json", model_type="bert"),
        ValueError,
        "must be a CLIP or SigLIP .*, it has model_type 'bert'; choose another model$",
    ),
    "naflex": (lambda d: edit_json(d / "config.json", model_type="siglip2"), ValueError, "a SigLIP 2 without naflex"),
    "no weights": (_lacks("model.safetensors"), FileNotFoundError, r"must have weights as safetensors .*, it has none"),
    "pickled weights": (_only_pickled, FileNotFoundError, r"pickled ones \(.bin\) alone, .* are not read; choose"),
    "cut weights": (lambda d: _cut(d / "model.safetensors"), ValueError, "weights of .* are damaged or not those"),
    "missing tensor": (_without_tensor, ValueError, "tensors missing or of another shape: 1, the first visual_"),
    "not finite": (_not_finite, ValueError, "some numbers are not finite"),
    "other sizes": (
        _other_sizes,
        ValueError,
        "of another shape: 6, the first vision_model.encoder",
    ),
    "no tokenizer": (
        _lacks("tokenizer.json"),
        FileNotFoundError,
        r"must have a tokenizer \(tokenizer.json, vocab.json",
    ),
    "cut tokenizer": (lambda d: _cut(d / "tokenizer.json"), ValueError, "the tokenizer of .* is damaged"),
    "other vocabulary": (_other_vocabulary, ValueError, "must make tokens below 40, .* get both from the same source"),
    "no end token": (_without_end_token, ValueError, "must end a text with token 517, .* get both from the same"),
    "no preprocessing": (_lacks("preprocessor_config.json"), FileNotFoundError, "must have a preprocessor_config.json"),
    "cut preprocessing": (lambda d: _cut(d / "preprocessor_config.json"), ValueError, "is no JSON"),
    "no size": (_pictures(size=None), ValueError, "must give size as a height and width .* got None"),
    "huge size": (_pictures(size={"height": 10**5, "width": 10**5}), ValueError, "as a shortest_edge, up to 4096, got"),
    "odd size": (_pictures(size={"longest_edge": 9}), ValueError, "must give size as a height and width"),
    "no crop": (_pictures(crop_size=-3), ValueError, "must give crop_size as a height and width .* got -3"),
    "nearest": (_pictures(resample=0), ValueError, r"resample=2 \(bilinear\) or 3 \(bicubic\), got 0; choose another"),
    "padded": (_pictures(do_pad=True), ValueError, "must not pad pictures"),
    "no mean": (_pictures(image_mean=0.5), ValueError, "must give image_mean as three numbers, got 0.5"),
    "no std": (_pictures(image_std=[1, 0, 1]), ValueError, "three numbers above 0"),
    "words": (_pictures(image_mean=["a", "b", "c"]), ValueError, r"image_mean as three numbers, got \['a'"),
    "other pictures": (_pictures(crop_size=24), ValueError, "must become 32 x 32 pixels .* makes 24 x 24 of 32 x 32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_in_one_sentence(
    copy: Callable[[str], Path], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    breaks, kind, message = BROKEN[name]
    directory = copy("clip")
    with hf_files.quiet_transformers():
        breaks(directory)
    with pytest.raises(kind, match=message) as caught:
        HFCLIPReranker.load(directory)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_a_damaged_tokenizer_of_siglip_is_refused(copy: Callable[[str], Path], file: str) -> None:
    directory = copy("siglip" if file == "spiece.model" else "siglip2")
    _cut(directory / file)
    with pytest.raises(ValueError, match=r"the tokenizer of .* is damaged") as caught:
        HFCLIPReranker.load(directory)
    assert "\n" not in str(caught.value)


def test_siglip_needs_a_padding_token(copy: Callable[[str], Path]) -> None:
    directory = copy("siglip2")
    edit_json(directory / "tokenizer_config.json", pad_token=None)
    edit_json(directory / "tokenizer.json", padding=None)
    with pytest.raises(ValueError, match="must have a padding token"):
        HFCLIPReranker.load(directory)


def test_pictures_that_do_not_become_square_are_refused(copy: Callable[[str], Path]) -> None:
    directory = copy("clip")
    edit_json(directory / "preprocessor_config.json", do_center_crop=False)
    reranker = HFCLIPReranker.load(directory)
    score(reranker, make_images(1, 40, 40))
    with pytest.raises(ValueError, match=r"must become 32 x 32 pixels .* makes 32 x 64 of 20 x 40"):
        score(reranker, make_images(1, 20, 40))


def test_packages_that_are_not_installed_are_named(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def without_sentencepiece(*_: object, **__: object) -> None:
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(transformers.SiglipTokenizer, "from_pretrained", without_sentencepiece)
    with pytest.raises(ValueError, match=f"needs sentencepiece, .*; {INSTALL}$"):
        HFCLIPReranker.load(models("siglip"))
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", "4.57.1")
        with pytest.raises(ValueError, match=f"needs transformers 5, got 4.57.1; {INSTALL}$"):
            HFCLIPReranker.load(models("clip"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError,
        match=f"needs transformers, which is not installed; {INSTALL}$",
    ):
        HFCLIPReranker.load(models("clip"))


COMMIT = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"


def put_in_cache(cache: Path, source: Path) -> Path:
    """A model in the hub's local cache, as its client lays it out."""
    repository = cache / "models--someone--some-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(source, repository / "snapshots" / COMMIT))


def test_a_model_of_the_hub_is_taken_from_the_local_cache(
    models: Callable[[str], Path], rerankers: dict[str, HFCLIPReranker], tmp_path: Path
) -> None:
    put_in_cache(tmp_path / "hub", models("clip"))
    images = make_images(2, 32, 32)
    for allow_download in (False, True):  # what is there is not downloaded
        reranker = HFCLIPReranker.load("someone/some-clip", allow_download=allow_download)
        torch.testing.assert_close(score(reranker, images), score(rerankers["clip"], images))
    assert reranker.facts == rerankers["clip"].facts | {"model": "someone/some-clip", "revision": COMMIT}


@pytest.mark.parametrize("is_partly_there", [False, True])
def test_nothing_is_downloaded_unless_allowed(
    models: Callable[[str], Path], tmp_path: Path, is_partly_there: bool
) -> None:
    if is_partly_there:
        (put_in_cache(tmp_path / "hub", models("clip")) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"rerank.allow_download=true to download it, or set rerank=none$"):
        HFCLIPReranker.load("someone/some-clip")
    message = r"could not be downloaded .* check its name and the network, or set rerank=none$"
    if is_partly_there:  # the hub's client then takes that
        message = r"must have weights as safetensors .*, its repository has none or could not be reached; .*=none$"
    with pytest.raises(OSError, match=message):
        HFCLIPReranker.load("someone/some-clip", allow_download=True)


def test_a_download_leaves_out_what_is_not_read(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    load_local = huggingface_hub.snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    source = Path(shutil.copytree(models("siglip"), tmp_path / "source"))
    others = ["pytorch_model.bin", "open_clip_model.safetensors", "onnx/model.safetensors", "README.md", "run.py"]
    for name in others:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("")

    def download(name: str, *, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
        if local_files_only:
            return load_local(name, local_files_only=True)
        files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        directory = put_in_cache(tmp_path / "hub", source)
        for file in set(files) - set(filter_repo_objects(files, allow_patterns=allow_patterns)):
            (directory / file).unlink()
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    reranker = HFCLIPReranker.load("someone/some-clip", allow_download=True)
    assert reranker.facts["revision"] == COMMIT
    got = {path.name for path in (tmp_path / "hub").rglob("*") if path.is_file()} - {"main"}
    assert got == {path.name for path in models("siglip").iterdir()} - {"generation_config.json"}


@pytest.mark.parametrize("name", ["no/such/directory", "/no/such", "./no", "clip", "", "a file"])
def test_what_is_neither_a_directory_nor_an_id_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").touch()
    path = str(tmp_path / name) if name == "a file" else name
    with pytest.raises(OSError, match=r"must be a directory with a model, or the id of one .*; correct it or set"):
        HFCLIPReranker.load(path, allow_download=True)
