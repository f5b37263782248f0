"""`python -m dalle1.evaluate`: what it measures, writes and says; interrupted and shared work gives the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1.checkpoint import load_dvae, weights_sha256
from dalle1.data import shapes
from dalle1.data.transforms import to_pixels
from dalle1.evaluation import chunks, reconstructions
from dalle1.evaluation.distances import frechet_distance
from dalle1.evaluation.extractors import CLIPExtractor, InceptionExtractor, load_extractor
from dalle1.evaluation.image_quality import psnr_db, squared_error, ssim
from dalle1.evaluation.pictures import to_uint8
from dalle1.evaluation.shapes_scorer import score
from dalle1.evaluation.system_command import draw_captions
from dalle1.losses import logit_laplace_nll
from dalle1.models.dvae import DVAE
from dalle1.models.pixels import map_pixels
from dalle1.reconstruct import reconstruct
from dalle1.results import SampleRun

Run = Callable[..., dict[str, Any]]


def value(content: dict[str, Any], name: str) -> float:
    """The number whose name begins so."""
    (found,) = (number for key, number in content["numbers"].items() if key.startswith(name))
    return float(found)


def test_tokenizer_numbers_are_those_of_each_picture_by_itself(
    run: Run,
    write_pictures: Callable[..., Path],
    checkpoints: dict[str, Path],
    inception_files: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = write_pictures(tmp_path / "a", 6)
    Image.open(folder / "000.png").resize((8, 30)).save(folder / "006.png")  # too narrow for SSIM, and no multiple of 4
    place = f"inception:{inception_files['probabilities']}"
    content = run(
        "tokenizer", folder, f"dvae={checkpoints['dvae']}", f"extractor={place}", "temperature=1e-6", "min_log_scale=-1"
    )

    dvae, extractor = load_dvae(checkpoints["dvae"]).model, load_extractor(place)
    images = [to_pixels(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    seen = [reconstruct(dvae, image / 255) for image in images]
    errors = [squared_error(s[None], image[None] / 255) for (s, _), image in zip(seen, images, strict=True)]
    similarity = [ssim(s[None], image[None] / 255) for (s, _), image in zip(seen[:6], images[:6], strict=True)]
    counts = torch.cat([tokens.flatten() for _, tokens in seen]).bincount()
    numbers = content["numbers"]
    assert numbers["mse[n=7]"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
    assert numbers["psnr_db[n=7]"] == pytest.approx(float(psnr_db(torch.cat(errors)).mean()), rel=1e-5)
    assert numbers["ssim[n=6]"] == pytest.approx(float(torch.cat(similarity).mean()), rel=1e-4)
    nats = [
        logit_laplace_nll(
            map_pixels(image[None] / 255),
            dvae.decode_vectors(torch.nn.functional.embedding(tokens, dvae.codebook)[None])[
                ..., : image.shape[1], : image.shape[2]
            ],
            min_log_scale=-1.0,
        ).mean()
        for (_, tokens), image in zip(seen, images, strict=True)
    ]
    assert numbers["nats_per_dim[n=7,floor=-1]"] == pytest.approx(float(torch.stack(nats).mean()), rel=1e-4)
    # Nearly hard codes lose nearly what hard ones do.
    hard, relaxed = (value(content, name) for name in ("mse[", "relaxed_mse[n=7,temperature=1e-06"))
    assert relaxed == pytest.approx(hard, rel=0.5)
    assert relaxed != hard
    assert numbers["codes_used[n=7,vocab=32]"] == int((counts > 0).sum())
    files = [torch.from_numpy(to_uint8(s[None])[0]).permute(2, 0, 1) for s, _ in seen]
    expected = frechet_distance(extractor(images).features, extractor(files).features)
    assert numbers[f"rfid[{extractor.name},n=7/7,blur=0]"] == pytest.approx(expected, rel=1e-3)
    assert any("1 pictures have less" in note for note in content["notes"])
    assert content["checkpoints"]["dvae"]["sha256"] == weights_sha256(dvae.state_dict())
    assert content["extractors"][extractor.name]["kind"] == "inception"
    assert all(name in content["printed"] for name in numbers)


@pytest.mark.parametrize("command", ["tokenizer {0} dvae={1}", "overlap train={0} val={0}"])
def test_classes_are_computed_only_where_a_number_needs_them(
    command: str,
    run: Run,
    write_pictures: Callable[..., Path],
    checkpoints: dict[str, Path],
    inception_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classes, calls = InceptionExtractor._classes, []
    monkeypatch.setattr(
        InceptionExtractor, "_classes", lambda self, pixels: (calls.append(1), classes(self, pixels))[1]
    )
    words = command.format(write_pictures(tmp_path / "a", 4), checkpoints["dvae"]).split()
    run(*words, f"extractor=inception:{inception_files['probabilities']}")
    assert len(calls) == 1  # when it was loaded


def test_interrupted_tokenizer_evaluation_goes_on_and_gives_the_same(
    run: Run,
    write_pictures: Callable[..., Path],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_pictures(tmp_path / "a", 7)
    arguments = (
        "tokenizer",
        folder,
        f"dvae={checkpoints['dvae']}",
        f"extractor=clip:{checkpoints['clip']}",
        "size=12x16",
    )
    compute = chunks.compute_chunks
    monkeypatch.setattr(reconstructions, "compute_chunks", lambda *a, **k: compute(*a, **(k | {"chunk_size": 2})))
    whole = run(*arguments, "cache=whole")
    ssim_of_batch, calls = reconstructions.ssim, []

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ssim_of_batch(*arguments)

    monkeypatch.setattr(reconstructions, "ssim", dying)
    assert "interrupted" in run(*arguments, "cache=cache", out="second", code=130)["error"]
    resumed = run(*arguments, "cache=cache", out="third")
    assert len(calls) == 3 + 2  # two chunks of four were there
    assert resumed["numbers"] == whole["numbers"]


def test_system_samples_the_captions_and_measures_the_pictures(
    system: Run, write_pictures: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_features, read = CLIPExtractor.text_features, list[str]()
    monkeypatch.setattr(
        CLIPExtractor, "text_features", lambda self, captions: (read.extend(captions), text_features(self, captions))[1]
    )
    reference = write_pictures(tmp_path / "reference", 24, size=(23, 17))
    content = system(reference, "prompts=21", "sample_dir=samples", "blur=0,1", "temperature=0.5", "seed=3")
    run = SampleRun.reopen(tmp_path / "samples")
    assert (run.origin.sampling["temperature"], run.origin.seed) == (0.5, 3)
    captions = [(reference / f"{i:03d}.txt").read_text() for i in range(24)]
    assert run.origin.prompts == draw_captions(captions, 21, seed=3)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 21  # no grids
    # Both sides as large as the samples.
    assert content["treatment"] == {"size": [12, 16], "blur": 0.0}
    inception, clip = content["extractors"]
    names = set(content["numbers"])
    for radius in (0, 1):
        for extractor in (inception, clip):
            what = f"{extractor},n=24/21,blur={radius}"
            kid = f"[{what},subsets=100x10]"
            assert {f"fid[{what}]", f"kid{kid}", f"kid_deviation{kid}", f"recall[{what},k=3]"} <= names
        assert f"inception_score[{inception},n=21,blur={radius},splits=10]" in names
        assert f"clip_score[{clip},n=21,blur={radius}]" in names
    assert not any(name.startswith("inception_score[clip") or name.startswith("clip_score[inception") for name in names)
    # Captions are read once, however many filters there are.
    assert sorted(read) == sorted(run.origin.prompts)
    error = system(reference, "samples=sampl*", samples=True, out="again", code=1)["error"]
    assert "samples must be a directory of sample.py itself, got 'sampl*'; give 'samples'" in error
    # The same pictures as a directory, and as a folder that somebody else wrote.
    again = system(reference, "samples=samples", "blur=0,1", "seed=3", samples=True, out="again")
    assert again["numbers"] == content["numbers"]
    other = tmp_path / "other"
    other.mkdir()
    for entry in run.entries:
        path = tmp_path / "samples" / entry["pictures"][0]["file"]
        Image.open(path).save(other / path.name)
        (other / path.name).with_suffix(".txt").write_text(entry["prompt"])
    assert (
        system(reference, "samples=other", "blur=0,1", "seed=3", samples=True, out="b")["numbers"] == content["numbers"]
    )


def test_best_of_is_the_best_by_the_reranker_of_the_first_candidates(
    system: Run, write_pictures: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    reference = write_pictures(tmp_path / "reference", 5)
    content = system(
        reference, "candidates=4", f"reranker=clip:{checkpoints['clip']}", "best_of=1,2,4", "sample_dir=samples"
    )
    # Of all candidates, which sample.py keeps.
    run = SampleRun.reopen(tmp_path / "samples")
    clip = load_extractor(f"clip:{checkpoints['clip']}")
    dvae = load_dvae(checkpoints["dvae"]).model
    files = [[] for _ in range(3)]
    for number, prompt in enumerate(run.origin.prompts):
        tokens = run.load(number)
        assert tokens is not None
        pictures = torch.from_numpy(to_uint8(dvae.decode(tokens))).permute(0, 3, 1, 2)
        features = torch.nn.functional.normalize(clip(list(pictures)).features, dim=1)
        scores = features @ clip.text_features([prompt])[0]
        for i, n in enumerate((1, 2, 4)):
            files[i].append(pictures[int(scores[:n].argmax())])
    assert [point["n"] for point in content["best_of"]] == [1, 2, 4]
    for point, chosen in zip(content["best_of"], files, strict=True):
        name = f"clip_score[{clip.name},n=5,blur=0,best_of={point['n']}]"
        features = torch.nn.functional.normalize(clip(chosen).features, dim=1)
        cosines = (features * clip.text_features(run.origin.prompts)).sum(1)
        assert point["numbers"][name] == pytest.approx(float(cosines.mean()), abs=1e-5)
        assert any(key.startswith("fid[inception") for key in point["numbers"])
    assert value(content, f"clip_score[{clip.name}") == content["best_of"][2]["numbers"][name]
    with Image.open(tmp_path / "result" / "best_of.png") as picture:
        assert picture.width > 300
    # A run of sample.py with all its candidates gives the same curve.
    again = system(reference, "samples=samples", "best_of=1,2,4", samples=True, out="again")
    assert again["best_of"] == content["best_of"]
    message = system(reference, "samples=samples", "best_of=3", samples=True, out="b", code=1)["error"]
    assert "best_of=3 needs all candidates" in message


def test_first_of_several_captions_counts(system: Run, write_pictures: Callable[..., Path], tmp_path: Path) -> None:
    reference = write_pictures(tmp_path / "reference", 4)
    first = system(reference, f"samples={reference}", samples=True, out="a")
    captions = [path.read_text() for path in sorted(reference.glob("*.txt"))]
    for path, caption in zip(sorted(reference.glob("*.txt")), captions, strict=True):
        path.write_text(f"\n {caption} \nanother caption\n")
    system(reference, "caption=lines", "sample_dir=samples")
    assert SampleRun.reopen(tmp_path / "samples").origin.prompts == captions
    assert (
        system(reference, f"samples={reference}", "caption=lines", samples=True, out="b")["numbers"] == first["numbers"]
    )
    error = system(reference, "samples=samples", "caption=lines", samples=True, out="c", code=1)["error"]
    assert "caption says where captions stand, 'samples' has prompts in manifest.json; leave it out" in error
    error = system(reference, f"samples={reference}", "caption=line", samples=True, out="c", code=1)["error"]
    assert "caption must be text, lines or json:FIELD, got 'line'" in error


def test_interrupted_sampling_goes_on_and_gives_the_same(
    system: Run, write_pictures: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write_pictures(tmp_path / "reference", 6)
    whole = system(reference, "sample_dir=whole")
    write, written = SampleRun.write, []

    def dying(*arguments: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        write(*arguments)

    monkeypatch.setattr(SampleRun, "write", dying)
    system(reference, "sample_dir=samples", out="a", code=130)
    error = system(reference, "samples=samples", samples=True, out="a", code=1)["error"]
    assert "must be a complete run of sampling" in error
    monkeypatch.setattr(SampleRun, "write", write)
    resumed = system(reference, "sample_dir=samples", out="b")
    assert resumed["numbers"] == whole["numbers"]
    monkeypatch.setattr(SampleRun, "finish", None)  # what is done is not written again
    assert system(reference, "sample_dir=samples", out="c")["numbers"] == whole["numbers"]


def test_reference_pictures_are_left_out_as_well(
    system: Run, write_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    reference, samples = write_pictures(tmp_path / "a", 8), write_pictures(tmp_path / "b", 9, seed=1)
    (tmp_path / "overlap.json").write_text(json.dumps({"keys": ["003.png", "000.png"], "threshold": 0.9}))
    content = system(reference, f"samples={samples}", "without=overlap.json", samples=True)
    inception = next(iter(content["extractors"]))
    for i in (0, 3):
        (reference / f"{i:03d}.png").unlink()
    less = system(reference, f"samples={samples}", samples=True, out="less")
    with_all, without = (f"fid[{inception},n={n}/9,blur=0{tag}]" for n, tag in ((8, ""), (6, ",without=2")))
    assert content["numbers"][without] == pytest.approx(less["numbers"][f"fid[{inception},n=6/9,blur=0]"])
    assert content["numbers"][with_all] != content["numbers"][without]


def test_scenes_are_scored_by_what_their_captions_say(
    system: Run, tmp_path: Path, write_pictures: Callable[..., Path]
) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    right = []
    for i in range(6):
        sample = shapes.make_sample(0, i, shapes.SceneMix())
        # Every second caption is another picture's.
        caption = sample.caption if i % 2 else shapes.make_sample(0, i + 1, shapes.SceneMix()).caption
        pixels = shapes.draw(sample.scene, 32)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
        right.append(score(pixels, caption).right)
    content = system(write_pictures(tmp_path / "a", 5), f"samples={folder}", samples=True)
    assert 0 < np.mean(right) < 1
    assert content["numbers"]["prompt_accuracy[shapes_scorer,n=6]"] == np.mean(right)


def test_captions_that_a_clip_cannot_read_leave_out_their_pictures_alone(
    system: Run, write_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "a", 5)
    (folder / "001.txt").write_text("a caption without end " * 100)
    content = system(folder, f"samples={folder}", samples=True)
    clip = list(content["extractors"])[1]
    assert f"clip_score[{clip},n=4,blur=0,captions_left_out=1]" in content["numbers"]
    assert sum(f"1 of 5 captions cannot be read by {clip}" in note for note in content["notes"]) == 1
    # Without captions there is no score, and all else is as it was.
    (folder / "001.txt").unlink()
    without = system(folder, f"samples={folder}", samples=True, out="without")
    assert sum(f"the CLIP score of {clip} is left out: " in note for note in without["notes"]) == 1
    assert without["numbers"].items() <= content["numbers"].items()
    assert len(without["numbers"]) == len(content["numbers"]) - 1


def test_captions_are_drawn_once_each_and_by_seed() -> None:
    captions = [f"caption {i % 50}" for i in range(100)]
    drawn = draw_captions(captions, 20, seed=0)
    assert len(set(drawn)) == 20
    assert drawn == [caption for caption in dict.fromkeys(captions) if caption in drawn]
    assert drawn == draw_captions(captions, 20, seed=0) != draw_captions(captions, 20, seed=1)
    assert draw_captions(captions, None, seed=0) == captions[:50]
    with pytest.raises(ValueError, match="number of different captions, 50, got 51"):
        draw_captions(captions, 51, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere"),
        (("{pictures}", "samples=nowhere"), "nowhere"),
        (("{pictures}", "samples={pictures}", "prompts=3"), "prompts says how to sample, leave it out with samples="),
        (("{pictures}", "samples={pictures}", "best_of=1"), "best_of needs samples of sample.py"),
        (("{pictures}", "samples={pictures}", "blur=-1"), "blur must be a radius >= 0 in pixels, got -1"),
        (("{pictures}", "samples={pictures}", "blur=1,much"), "numbers with commas between them, got 'much'"),
        (("{pictures}", "samples={pictures}", "best_of=0"), "best_of must be >= 1, got 0"),
        (("{pictures}", "samples={pictures}", "without=nowhere.json"), "nowhere.json"),
        (("{pictures}", "samples={pictures}", "size=big"), "got 'big'"),
        (("{pictures}", "samples={one}"), "at least 2 pictures of each side, got 4 and 1"),
        (("{pictures}", "candidates=0"), "candidates must be >= 1, got 0"),
        (("{pictures}", "reranker={clip}"), "reranker chooses among several candidates, got candidates=1"),
        (("{pictures}", "candidates=2", "reranker=none"), "the best of 2 candidates needs a reranker, got none"),
        (("{pictures}", "candidates=2", "best_of=4", "reranker={clip}"), "best_of must be numbers in [1, 2]"),
        (("{pictures}", "prompts=9"), "at most the number of different captions, 4, got 9"),
        (("{pictures}", "extractor=vgg:x"), "an extractor must be"),
        (("{pictures}", "extractor={clip}"), "each extractor must be given once"),
        (("{pictures}", "extractor=inception:hf://a/b/c.pt"), "give --allow_download"),
        (("{pictures}", "extractor=inception:hf://a/b/c.pt", "--allow_download"), "could not be downloaded"),
        (("{pictures}", "guidance_scale=2"), "guidance needs a transformer trained with optim.caption_dropout"),
        (("{pictures}", "temperature=-1"), "temperature"),
        (("{pictures}", "samples={pictures}", "cache={file}"), "cache must be a directory"),
        (("{pictures}", "sample_dir={pictures}"), "sample_dir must be free, or hold these very samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_in_one_line(
    system: Run,
    write_pictures: Callable[..., Path],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_hub(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_hub)
    places = {
        "pictures": write_pictures(tmp_path / "a", 4),
        "one": write_pictures(tmp_path / "one", 1),
        "clip": f"clip:{checkpoints['clip']}",
        "file": __file__,
    }
    words = [argument.format(**places) for argument in arguments]
    samples = any(word.startswith("samples=") for word in words)
    error = system(*words, samples=samples, code=1)["error"]
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_command_line_mistakes_are_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no option 'blurr'" in run("system", "pictures", "blurr=1", code=2)["error"]
    assert "invalid choice: 'systems'" in run("systems", code=2)["error"]


def test_one_picture_is_refused_by_the_tokenizer(run: Run, write_pictures: Callable[..., Path], tmp_path: Path) -> None:
    error = run("tokenizer", write_pictures(tmp_path / "a", 1), code=1)["error"]
    assert "at least 2 pictures, got 1" in error


def test_floor_of_likelihoods_is_that_of_training(
    run: Run,
    write_pictures: Callable[..., Path],
    make_dvae: Callable[..., DVAE],
    write_checkpoint: Callable[..., Path],
    checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:
    trained = {"options": {"optim": {"min_log_scale": -2.5}}}
    dvae = write_checkpoint(tmp_path / "dvae.ckpt", make_dvae(), extra=trained)
    arguments = (
        "tokenizer",
        write_pictures(tmp_path / "a", 3),
        f"dvae={dvae}",
        f"extractor=clip:{checkpoints['clip']}",
    )
    content = run(*arguments)
    assert "nats_per_dim[n=3,floor=-2.5]" in content["numbers"]
    assert not any("floor on ln b" in note for note in content["notes"])
    assert "temperature must be > 0, got 0" in run(*arguments, "temperature=0", out="b", code=1)["error"]
    assert "min_log_scale must be a number or -inf" in run(*arguments, "min_log_scale=nan", out="b", code=1)["error"]
