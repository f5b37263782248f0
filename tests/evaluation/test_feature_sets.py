"""Features of picture sets: cached, resumable, shared by processes, and never compared across treatments."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from torch import Tensor

from dalle1.data.transforms import to_pixels
from dalle1.evaluation.chunks import chunk_path
from dalle1.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from dalle1.evaluation.extractors import Extractor, load_extractor
from dalle1.evaluation.feature_sets import FeatureSet, caption_score, class_score, compare, extract, read_captions
from dalle1.evaluation.picture_sets import PictureSet, Treatment, open_pictures, parse_size
from dalle1.evaluation.ranks import Ranks, joined_ranks


class Counting:
    """An extractor that counts the pictures it has seen, and dies before one of them."""

    def __init__(self, extractor: Extractor, *, dies_before: int | None = None) -> None:
        self._extractor, self._dies_before, self.seen = extractor, dies_before, 0

    def __call__(self, pictures: Sequence[Tensor]) -> object:
        if self._dies_before is not None and self.seen + len(pictures) > self._dies_before:
            raise KeyboardInterrupt
        self.seen += len(pictures)
        return self._extractor(pictures)

    def __getattr__(self, name: str) -> object:
        return getattr(self._extractor, name)


@pytest.fixture
def extractor(inception_files: dict[str, Path]) -> Extractor:
    return load_extractor(f"inception:{inception_files['probabilities']}")


def features(pictures: PictureSet, extractor: object, cache: Path, treatment: Treatment = Treatment()) -> FeatureSet:  # noqa: B008
    return extract(
        pictures, extractor, treatment, cache=cache, ranks=Ranks(), label="test", chunk_size=4  # type: ignore[arg-type]
    )  # fmt: skip


def test_features_are_those_of_the_pictures_in_their_order(
    write_pictures: Callable[..., Path], extractor: Extractor, tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "a", 10)
    result = features(open_pictures([str(folder)]), extractor, tmp_path / "cache")
    expected = [extractor([to_pixels(Image.open(path))]) for path in sorted(folder.glob("*.png"))]
    assert torch.allclose(result.features(), torch.cat([each.features for each in expected]), atol=1e-6)
    probabilities = result.probabilities()
    assert probabilities is not None
    assert probabilities.shape == (10, 5)


def test_interrupted_extraction_goes_on_and_gives_the_same(
    write_pictures: Callable[..., Path], extractor: Extractor, tmp_path: Path
) -> None:
    pictures = open_pictures([str(write_pictures(tmp_path / "a", 10))])
    whole = features(pictures, extractor, tmp_path / "whole")
    dying = Counting(extractor, dies_before=7)
    with pytest.raises(KeyboardInterrupt):
        features(pictures, dying, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").rglob("*.safetensors")] == ["00000.safetensors"]
    going_on = Counting(extractor)
    result = features(pictures, going_on, tmp_path / "cache")
    assert going_on.seen == 6
    assert torch.equal(result.features(), whole.features())
    third = Counting(extractor)
    features(pictures, third, tmp_path / "cache")
    assert third.seen == 0  # all of it is there


def test_changed_or_other_pictures_and_treatments_are_computed_anew(
    write_pictures: Callable[..., Path], extractor: Extractor, inception_files: dict[str, Path], tmp_path: Path
) -> None:
    folder, cache = write_pictures(tmp_path / "a", 5), tmp_path / "cache"

    def seen(treatment: Treatment = Treatment(), of: Extractor = extractor) -> int:  # noqa: B008
        counting = Counting(of)
        features(open_pictures([str(folder)]), counting, cache, treatment)
        return counting.seen

    assert [seen(), seen()] == [5, 0]
    assert seen(Treatment(blur=1)) == 5
    assert seen(Treatment(size=(8, 8))) == 5
    assert seen(of=load_extractor(f"inception:{inception_files['logits']}")) == 5
    Image.new("RGB", (9, 9)).save(folder / "001.png")
    assert seen() == 5
    os.utime(folder / "002.png", ns=(1, 1))  # the same bytes written again are another file
    assert seen() == 5
    (folder / "003.png").rename(folder / "003-b.png")
    assert seen() == 5
    assert seen() == 0


def test_shard_and_folder_of_the_same_pictures_have_equal_features(
    write_pictures: Callable[..., Path], extractor: Extractor, tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "a", 5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    of_folder = open_pictures([str(folder)])
    of_shard = open_pictures([str(tmp_path / "a.tar")])
    assert (
        of_folder.captions == of_shard.captions == [f"{('a red circle', 'a blue square')[i % 2]} {i}" for i in range(5)]
    )
    assert of_folder.sha256 != of_shard.sha256
    first, second = (features(each, extractor, tmp_path / "cache").features() for each in (of_folder, of_shard))
    assert torch.equal(first, second)


def _one_of_two(rank: int, folder: str, inception: str, cache: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined_ranks() as ranks:
        counting = Counting(load_extractor(f"inception:{inception}"))
        result = extract(
            open_pictures([folder]), counting, Treatment(), cache=Path(cache), ranks=ranks, label="", chunk_size=2  # type: ignore[arg-type]
        )  # fmt: skip
        if ranks.is_first:
            compare(result, result)  # which waits for nobody
        Path(cache, f"seen-{rank}").write_text(str(counting.seen))


def test_two_processes_share_the_chunks_and_give_the_same_bits(
    write_pictures: Callable[..., Path], inception_files: dict[str, Path], tmp_path: Path, free_port: int
) -> None:
    folder, cache = write_pictures(tmp_path / "a", 9), tmp_path / "cache"
    arguments = (str(folder), str(inception_files["probabilities"]), str(cache), free_port)
    multiprocessing.spawn(_one_of_two, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    assert [int((cache / f"seen-{rank}").read_text()) for rank in (0, 1)] == [5, 4]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = Counting(load_extractor(f"inception:{inception_files['probabilities']}"))
    result = extract(
        open_pictures([str(folder)]), alone, Treatment(), cache=tmp_path / "b", ranks=Ranks(), label="", chunk_size=2  # type: ignore[arg-type]
    )  # fmt: skip
    torch.set_num_threads(threads)
    assert alone.seen == 9
    (shared,) = (path.parent for path in cache.rglob("recipe.json"))
    for number in range(5):
        assert chunk_path(shared, number).read_bytes() == chunk_path(result.chunks.directory, number).read_bytes()
    recipe = json.loads((shared / "recipe.json").read_text())
    assert recipe["treatment"] == {"size": None, "blur": 0.0}


def test_treatment_fits_first_and_then_blurs_as_pillow_does() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    assert torch.equal(Treatment()(picture), to_pixels(picture))
    fitted = picture.crop((10, 0, 40, 30)).resize((10, 10), Image.Resampling.BOX)
    assert torch.equal(Treatment(size=(10, 10))(picture), to_pixels(fitted))
    blurred = to_pixels(fitted.filter(ImageFilter.GaussianBlur(2)))
    assert torch.equal(Treatment(size=(10, 10), blur=2)(picture), blurred)
    assert Treatment(size=(6, 12))(picture).shape == (3, 6, 12)


def test_numbers_say_with_what_and_of_how_many_they_are(
    write_pictures: Callable[..., Path], extractor: Extractor, tmp_path: Path
) -> None:
    folders = (write_pictures(tmp_path / "a", 20), write_pictures(tmp_path / "b", 24, seed=1))
    sets = [features(open_pictures([str(folder)]), extractor, tmp_path / "cache") for folder in folders]
    reference, samples = sets
    numbers = compare(reference, samples, prefix="r", tag="best_of=4")
    what = f"{extractor.name},n=20/24,blur=0,best_of=4"
    assert numbers.values[f"rfid[{what}]"] == frechet_distance(reference.features(), samples.features())
    kid = kernel_distance(reference.features(), samples.features(), subset_size=10)
    assert numbers.values[f"rkid[{what},subsets=100x10]"] == kid.mean
    shares = precision_recall(reference.features(), samples.features())
    assert numbers.values[f"rprecision[{what},k=3]"] == shares.precision
    assert numbers.values[f"rrecall[{what},k=3]"] == shares.recall
    assert not numbers.notes
    without = compare(reference, samples, rows=range(3, 20))
    name = f"fid[{extractor.name},n=17/24,blur=0,without=3]"
    assert without.values[name] == frechet_distance(reference.features()[3:], samples.features())
    assert list(class_score(samples).values) == [
        f"inception_score[{extractor.name},n=24,blur=0,splits=10]",
        f"inception_score_deviation[{extractor.name},n=24,blur=0,splits=10]",
    ]


def test_features_without_classes_are_not_taken_for_those_with(
    write_pictures: Callable[..., Path], inception_files: dict[str, Path], tmp_path: Path
) -> None:
    pictures = open_pictures([str(write_pictures(tmp_path / "a", 20))])
    place = f"inception:{inception_files['probabilities']}"
    alone = features(pictures, load_extractor(place, classes=False), tmp_path / "cache")
    assert class_score(alone).values == {}
    both = features(pictures, load_extractor(place), tmp_path / "cache")
    assert len(class_score(both).values) == 2
    assert torch.equal(alone.features(), both.features())


def test_too_few_pictures_are_noted(write_pictures: Callable[..., Path], extractor: Extractor, tmp_path: Path) -> None:
    pictures = open_pictures([str(write_pictures(tmp_path / "a", 3))])
    few = features(pictures, extractor, tmp_path / "cache")
    numbers = compare(few, few)
    assert any("no more pictures than the 12 features" in note for note in numbers.notes)
    assert any(note.startswith("precision and recall need more than 3 pictures") for note in numbers.notes)
    assert "the inception score needs at least 20 pictures, got 3" in class_score(few).notes[0]
    one = features(PictureSet([pictures.samples[0]]), extractor, tmp_path / "cache")
    with pytest.raises(ValueError, match="at least 2 pictures of each side, got 1 and 3"):
        compare(one, few)


def test_clip_score_is_the_mean_cosine_of_pictures_and_their_captions(
    write_pictures: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from dalle1.rerank.own_clip import CLIPReranker

    clip = load_extractor(f"clip:{checkpoints['clip']}")
    folder = write_pictures(tmp_path / "a", 6)
    pictures = open_pictures([str(folder)])
    of_pictures = features(pictures, clip, tmp_path / "cache")
    read = read_captions(pictures.captions, clip)
    numbers = caption_score(of_pictures, pictures.captions, *read)
    reranker = CLIPReranker.load(checkpoints["clip"])
    cosines = [
        float(reranker.score(caption, to_pixels(Image.open(path))[None] / 255, torch.zeros(1, 3, 4)))
        for caption, path in zip(pictures.captions, sorted(folder.glob("*.png")), strict=True)
    ]
    assert numbers.values == {f"clip_score[{clip.name},n=6,blur=0]": pytest.approx(np.mean(cosines), abs=1e-5)}
    assert not numbers.notes
    # One that is too long leaves out its own picture alone.
    captions = [*pictures.captions]
    captions[2] = captions[4] = "a caption without end " * 100
    numbers = caption_score(of_pictures, captions, *read_captions(captions, clip), tag="best_of=1")
    name = f"clip_score[{clip.name},n=4,blur=0,captions_left_out=2,best_of=1]"
    assert numbers.values == {name: pytest.approx(np.mean([cosines[i] for i in (0, 1, 3, 5)]), abs=1e-5)}
    (note,) = numbers.notes
    assert (
        f"2 of 6 captions cannot be read by {clip.name} and are left out of its CLIP score (caption must have" in note
    )
    assert len(note) < 300
    nothing = caption_score(of_pictures, captions[2:3] * 6, *read_captions(captions[2:3], clip))
    assert not nothing.values
    assert "6 of 6 captions cannot be read" in nothing.notes[0]


def test_sets_of_other_treatments_or_extractors_are_not_compared(
    write_pictures: Callable[..., Path], inception_files: dict[str, Path], extractor: Extractor, tmp_path: Path
) -> None:
    pictures = open_pictures([str(write_pictures(tmp_path / "a", 4))])
    cache = tmp_path / "cache"
    plain = features(pictures, extractor, cache)
    others = [
        features(pictures, extractor, cache, Treatment(blur=2)),
        features(pictures, extractor, cache, Treatment(size=(8, 8))),
        features(pictures, load_extractor(f"inception:{inception_files['logits']}"), cache),
    ]
    for other in others:
        with pytest.raises(ValueError, match="the same extractor and treatment to be compared, got inception-"):
            compare(plain, other)


def test_damage_is_said_in_one_sentence(
    write_pictures: Callable[..., Path], extractor: Extractor, tmp_path: Path
) -> None:
    folder, cache = write_pictures(tmp_path / "a", 5), tmp_path / "cache"
    pictures = open_pictures([str(folder)])
    result = features(pictures, extractor, cache)
    path = chunk_path(result.chunks.directory, 1)
    assert set(load_file(path)) == {"features", "probabilities"}
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is damaged")):
        _ = features(pictures, extractor, cache).features()
    (folder / "002.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"the picture of sample '002.png' in .* cannot be decoded \(it is not a JPEG"):
        features(open_pictures([str(folder)]), extractor, cache)
    (folder / "004.txt").unlink()
    with pytest.raises(ValueError, match=r"sample '004.png' in .* has no caption"):
        _ = open_pictures([str(folder)]).captions


def test_pictures_are_left_out_by_their_keys(write_pictures: Callable[..., Path], tmp_path: Path) -> None:
    pictures = open_pictures([str(write_pictures(tmp_path / "a", 4))])
    assert pictures.rows_without(["002.png", "000.png"]) == [1, 3]
    with pytest.raises(ValueError, match=r"1 are not, such as '9\.png'"):
        pictures.rows_without(["000.png", "9.png"])
    with pytest.raises(ValueError, match="some pictures must be left, got 4 keys"):
        pictures.rows_without([f"00{i}.png" for i in range(4)])


def test_sizes_are_a_side_or_height_and_width() -> None:
    assert parse_size("256") == (256, 256)
    assert parse_size("192x256") == (192, 256)
    for text in ("", "0", "12x", "1x2x3", "-4", "4.5"):
        with pytest.raises(ValueError, match=re.escape(f"got {text!r}")):
            parse_size(text)
    with pytest.raises(ValueError, match="blur must be a radius >= 0 in pixels, got -1"):
        Treatment(blur=-1)
