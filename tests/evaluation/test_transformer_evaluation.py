"""What is measured of a transformer: against the cross-entropy of its logits, in chunks, by several processes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle1.checkpoint import Loaded, load_image_tokenizer, load_transformer
from dalle1.data.token_shards import EncodedSample, TokenManifest, shard_path, write_manifest, write_token_shard
from dalle1.data.transforms import decode_image, fit_picture, to_unit_interval
from dalle1.evaluate import main
from dalle1.evaluation.captioned_tokens import CaptionedTokens
from dalle1.evaluation.position_figures import draw_image_positions, draw_text_positions
from dalle1.evaluation.ranks import Ranks
from dalle1.evaluation.transformer_command import format_numbers
from dalle1.evaluation.transformer_likelihood import TransformerNumbers, evaluate_transformer
from dalle1.models.transformer import DalleTransformer
from dalle1.tokenizers.image import ImageTokenizer

CAPTIONS = ["a red circle", "a blue square on the left", "x", "two green stars", "a red star", "stars", "a square"]
CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of captioned pictures of different sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, caption in enumerate(CAPTIONS):
        pixels = random.integers(0, 256, (12 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def image_tokenizer(checkpoints: dict[str, Path]) -> ImageTokenizer:
    return load_image_tokenizer(checkpoints["dvae"])


@pytest.fixture(scope="module")
def transformer(checkpoints: dict[str, Path]) -> Loaded[DalleTransformer]:
    return load_transformer(checkpoints["transformer"])


@pytest.fixture
def evaluate(
    tmp_path: Path, transformer: Loaded[DalleTransformer], image_tokenizer: ImageTokenizer
) -> Callable[..., TransformerNumbers]:
    """Evaluates pictures; keywords override what is given."""

    def evaluate(
        paths: Sequence[Path], *, cache: str = "cache", loaded: Loaded[DalleTransformer] = transformer, **how: Any
    ) -> TransformerNumbers:
        names = ("caption", "truncate_captions", "on_bad_sample", "split")
        reading = {name: how.pop(name) for name in names if name in how}
        samples = CaptionedTokens.open(list(map(str, paths)), loaded, image_tokenizer, **reading)
        how = {"ranks": Ranks(), "device": CPU, "cache": tmp_path / cache} | how
        return evaluate_transformer(samples, loaded, **how)

    return evaluate


def _tokens(
    pictures: Path, transformer: Loaded[DalleTransformer], image_tokenizer: ImageTokenizer
) -> tuple[Tensor, Tensor]:
    assert transformer.text_tokenizer is not None
    images = [fit_picture(decode_image(path.read_bytes()), 12, 16) for path in sorted(pictures.glob("*.png"))]
    image_tokens = image_tokenizer.encode(to_unit_interval(torch.stack(images)))
    return transformer.text_tokenizer.encode(CAPTIONS[: len(images)]), image_tokens


def test_numbers_are_those_of_the_logits(
    pictures: Path,
    transformer: Loaded[DalleTransformer],
    image_tokenizer: ImageTokenizer,
    evaluate: Callable[..., TransformerNumbers],
) -> None:
    guided = replace(transformer, caption_dropout=0.1)
    numbers = evaluate([pictures], loaded=guided, batch_size=2, chunk_size=3)
    text_tokens, image_tokens = _tokens(pictures, transformer, image_tokenizer)
    nothing = transformer.model.empty_text().expand(len(text_tokens), -1)
    with torch.no_grad():
        text_logits, image_logits = transformer.model(text_tokens, image_tokens.flatten(1))
        _, without_logits = transformer.model(nothing, image_tokens.flatten(1))
    # Every token of a caption and the one that ends it.
    rows = [
        (row, place) for row, ids in enumerate(text_tokens.tolist()) for place in range(sum(i < 300 for i in ids) + 1)
    ]
    logits = torch.stack([text_logits[row, place] for row, place in rows]).double()
    targets = torch.stack([text_tokens[row, place] for row, place in rows])
    text = F.cross_entropy(logits, targets, reduction="none")
    image = F.cross_entropy(image_logits.double().mT, image_tokens.flatten(1), reduction="none")
    without = F.cross_entropy(without_logits.double().mT, image_tokens.flatten(1), reduction="none")
    gain = (without - image).sum(1)

    n = len(CAPTIONS)
    expected = {
        "samples": n,
        "bad_samples": 0,
        "text_nats_per_token": text.mean(),
        "text_accuracy": (logits.argmax(1) == targets).double().mean(),
        "text_nats_per_caption": text.sum() / n,
        "text_tokens_per_caption": len(rows) / n,
        "first_text_token_nats": text[[i for i, (_, place) in enumerate(rows) if place == 0]].mean(),
        "caption_end_nats": text[targets >= 300].mean(),
        "image_nats_per_token": image.mean(),
        "image_accuracy": (image_logits.argmax(2) == image_tokens.flatten(1)).double().mean(),
        "image_nats_per_picture": image.sum(1).mean(),
        "image_nats_per_picture_error": image.sum(1).std() / n**0.5,
        "image_bits_per_pixel_value": image.sum(1).mean() / math.log(2) / (3 * 12 * 16),
        "uniform_image_nats_per_token": math.log(32),
        "first_image_token_nats": image[:, 0].mean(),
        "last_image_token_nats": image[:, -1].mean(),
        "image_nats_per_token_without_caption": without.mean(),
        "caption_gain_nats_per_picture": gain.mean(),
        "caption_gain_nats_per_picture_error": gain.std() / n**0.5,
        "caption_gain_share": (gain > 0).double().mean(),
    }
    measured = dict(numbers.values)
    of_captions = torch.tensor(
        [sum(float(text[i]) for i, (row, _) in enumerate(rows) if row == each) for each in range(n)]
    )
    assert measured.pop("text_nats_per_caption_error") == pytest.approx(float(of_captions.std()) / n**0.5, rel=1e-5)
    assert measured == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5, abs=1e-5)

    positions = numbers.positions
    torch.testing.assert_close(positions.image_nats, image.mean(0).view(3, 4), rtol=1e-5, atol=1e-6)
    assert positions.caption_gain is not None
    torch.testing.assert_close(positions.caption_gain, (without - image).mean(0).view(3, 4), rtol=1e-4, atol=1e-5)
    for place in range(text_tokens.shape[1]):
        here = [i for i, (_, each) in enumerate(rows) if each == place]
        assert int(positions.n_text[place]) == len(here)
        if here:
            assert float(positions.text_nats[place]) == pytest.approx(float(text[here].mean()), rel=1e-5)
        else:
            assert math.isnan(positions.text_nats[place])
    content = json.loads(json.dumps(numbers.means_by_position(), allow_nan=False))
    assert content["image_nats_by_row"] == pytest.approx(image.mean(0).view(3, 4).mean(1).tolist(), rel=1e-5)
    assert content["text_nats"][-1] is None


def test_one_sample_has_no_standard_errors(
    pictures: Path, transformer: Loaded[DalleTransformer], evaluate: Callable[..., TransformerNumbers]
) -> None:
    for path in sorted(pictures.glob("*.png"))[1:]:
        path.unlink()
    numbers = evaluate([pictures], loaded=replace(transformer, caption_dropout=0.1))
    assert numbers.values["samples"] == 1
    assert not [name for name in numbers.values if name.endswith("_error")]
    assert "±" not in format_numbers(numbers)


def test_without_caption_dropout_nothing_is_said_of_captions(
    pictures: Path, evaluate: Callable[..., TransformerNumbers]
) -> None:
    numbers = evaluate([pictures])
    assert not [name for name in numbers.values if "gain" in name or "without" in name]
    assert numbers.positions.caption_gain is None


def test_chunks_and_batches_change_nothing_but_rounding(
    pictures: Path, evaluate: Callable[..., TransformerNumbers]
) -> None:
    expected = evaluate([pictures], chunk_size=100).values
    for chunk_size, batch_size in ((1, 1), (3, 2), (4, 100)):
        values = evaluate([pictures], chunk_size=chunk_size, batch_size=batch_size, cache=f"{chunk_size}").values
        assert values == pytest.approx(expected, rel=1e-5)


def test_interrupted_evaluation_goes_on_and_processes_share_it(
    pictures: Path, tmp_path: Path, evaluate: Callable[..., TransformerNumbers], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate([pictures], chunk_size=2, cache="whole")
    read: list[range] = []
    batches = CaptionedTokens.batches

    def counted(self: CaptionedTokens, numbers: range, **how: Any) -> Any:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(numbers)
        return batches(self, numbers, **how)

    monkeypatch.setattr(CaptionedTokens, "batches", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate([pictures], chunk_size=2, cache="parts")
    assert read == [range(0, 2), range(2, 4)]
    # Another process, the second of two, has the fourth chunk; the first one has the rest.
    read.clear()
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    with pytest.raises(FileNotFoundError):  # it does not wait here
        evaluate([pictures], chunk_size=2, cache="parts", ranks=Ranks(1, 2))
    assert read == [range(6, 7)]
    resumed = evaluate([pictures], chunk_size=2, cache="parts", ranks=Ranks(0, 2))
    assert read == [range(6, 7), range(4, 6)]
    assert resumed.values == whole.values
    assert torch.equal(resumed.positions.image_nats, whole.positions.image_nats)


def test_another_picture_is_another_set(pictures: Path, evaluate: Callable[..., TransformerNumbers]) -> None:
    before = evaluate([pictures]).values
    Image.new("RGB", (40, 40), "red").save(pictures / "0.png")
    assert evaluate([pictures]).values["image_nats_per_token"] != before["image_nats_per_token"]


def test_another_caption_is_another_set(pictures: Path, evaluate: Callable[..., TransformerNumbers]) -> None:
    before = evaluate([pictures]).values
    (pictures / "0.txt").write_text("x red star")
    assert evaluate([pictures]).values["text_nats_per_token"] != before["text_nats_per_token"]


@pytest.fixture
def token_directory(
    pictures: Path, tmp_path: Path, transformer: Loaded[DalleTransformer], image_tokenizer: ImageTokenizer
) -> Callable[..., Path]:
    """Writes the tokens of the pictures as stage=tokens does, the validation set with a second crop."""

    def write(**changes: Any) -> Path:
        directory = tmp_path / "tokens"
        facts: dict[str, Any] = {
            "dvae_sha256": image_tokenizer.sha256, "vocab_size": 32, "grid": [3, 4], "image_size": 12, "crops": 1,
            "augmentation": "none", "background": "white", "small_pictures": "enlarge", "seed": 0, "caption": "text",
            "filters": {}, "samples_sha256": {"train": "", "val": ""}, "n_shards": {"train": [1], "val": [1]},
            "weights": {"train": [1.0], "val": [1.0]},
        }  # fmt: skip
        write_manifest(directory, TokenManifest(**(facts | changes)))
        _, tokens = _tokens(pictures, transformer, image_tokenizer)
        for split, keep in (("train", 2), ("val", len(tokens))):
            samples = [
                EncodedSample(str(i), tokens[[i, (i + 1) % 7]].numpy().astype(np.uint16), CAPTIONS[i].encode(), None)
                for i in range(keep)
            ]
            write_token_shard(shard_path(directory, "train" if split == "train" else "val", 0), samples)
        return directory

    return write


def test_tokens_stand_for_their_pictures(
    pictures: Path, token_directory: Callable[..., Path], evaluate: Callable[..., TransformerNumbers]
) -> None:
    directory = token_directory()
    assert evaluate([directory]).values == evaluate([pictures]).values
    assert evaluate([directory], split="train").values["samples"] == 2


def test_bad_samples_are_errors_or_are_left_out(
    pictures: Path, evaluate: Callable[..., TransformerNumbers], caplog: pytest.LogCaptureFixture
) -> None:
    good = evaluate([pictures]).values
    (pictures / "7.png").write_bytes(b"no picture")
    (pictures / "7.txt").write_text("a star")
    Image.new("RGB", (20, 20)).save(pictures / "8.png")
    Image.new("RGB", (20, 20)).save(pictures / "9.png")
    (pictures / "9.txt").write_text("a long caption " * 30)
    with pytest.raises(
        ValueError, match=r"picture of sample '7.png' in .* cannot be decoded .* set on_bad_sample=skip"
    ):
        evaluate([pictures])
    values = evaluate([pictures], on_bad_sample="skip").values
    assert (values["samples"], values["bad_samples"]) == (7, 3)
    assert values | {"bad_samples": 0} == pytest.approx(good, rel=1e-6)
    assert len([line for line in caplog.messages if line.startswith("skipped: ")]) == 3
    values = evaluate([pictures], on_bad_sample="skip", truncate_captions=True).values
    assert (values["samples"], values["bad_samples"]) == (8, 2)
    for path in pictures.glob("*.txt"):
        path.write_text("")
    with pytest.raises(ValueError, match="at least one sample must be good, got 10 bad ones"):
        evaluate([pictures], on_bad_sample="skip")


def test_what_does_not_fit_is_refused(
    pictures: Path,
    token_directory: Callable[..., Path],
    transformer: Loaded[DalleTransformer],
    evaluate: Callable[..., TransformerNumbers],
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="pictures need the transformer's dVAE, there is none for"):
        CaptionedTokens.open([str(pictures)], transformer, None)
    with pytest.raises(ValueError, match="the transformer needs the dVAE it was trained with"):
        evaluate([pictures], loaded=replace(transformer, dvae_sha256="0" * 64))
    with pytest.raises(ValueError, match="tokens must be those of the transformer's dVAE, 000000000000, got those of"):
        evaluate([token_directory()], loaded=replace(transformer, dvae_sha256="0" * 64))
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        evaluate([pictures], batch_size=0)
    with pytest.raises(FileNotFoundError):
        evaluate([tmp_path / "nothing"])


def test_tokens_of_another_grid_are_refused(
    token_directory: Callable[..., Path], evaluate: Callable[..., TransformerNumbers]
) -> None:
    with pytest.raises(ValueError, match="tokens must have the transformer's grid, 3 x 4, got 4 x 3"):
        evaluate([token_directory(grid=[4, 3])])


def test_figures_show_the_gain_and_end_with_the_longest_caption(
    pictures: Path, transformer: Loaded[DalleTransformer], evaluate: Callable[..., TransformerNumbers]
) -> None:
    plain = evaluate([pictures]).positions
    guided = evaluate([pictures], loaded=replace(transformer, caption_dropout=0.5), cache="guided").positions
    widths = [draw_image_positions(positions).width for positions in (plain, guided)]
    assert widths == [720, 1080], "one panel more"
    # Beyond the longest caption there is nothing to show.
    longest = int((plain.n_text > 0).sum())
    cut = {name: getattr(plain, name)[:longest] for name in ("text_nats", "text_accuracy", "n_text")}
    assert draw_text_positions(replace(plain, **cut)).tobytes() == draw_text_positions(plain).tobytes()
    other = replace(plain, text_nats=plain.text_nats + 1)
    assert draw_text_positions(other).tobytes() != draw_text_positions(plain).tobytes()


def test_command_writes_what_it_prints(
    pictures: Path,
    tmp_path: Path,
    checkpoints: dict[str, Path],
    evaluate: Callable[..., TransformerNumbers],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    models = [f"{name}={checkpoints[name]}" for name in ("transformer", "dvae")]
    arguments = ["evaluate", "transformer", str(pictures), *models, f"cache={tmp_path / 'cache'}", f"out={out}"]
    monkeypatch.setattr(sys, "argv", [*arguments, "batch_size=3", "device=cpu"])
    main()
    printed = capsys.readouterr().out
    content = json.loads((out / "evaluation.json").read_text())
    values = evaluate([pictures]).values
    counts = {name: values.pop(name) for name in ("samples", "bad_samples")}
    assert content["numbers"] == pytest.approx(counts | {f"{name}[n=7]": value for name, value in values.items()})
    assert f"image nats per token          {values['image_nats_per_token']:.5g}" in printed
    assert "7 captioned pictures" in printed
    assert content["settings"]["batch_size"] == 3
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluation.json",
        "image_positions.png",
        "text_positions.png",
    ]

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "out must not exist yet or be an empty directory" in capsys.readouterr().err
