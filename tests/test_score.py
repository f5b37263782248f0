"""`python -m dalle1.score`: its numbers against independent ones, where captions come from, and bad inputs."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle1.checkpoint import load_dvae, load_transformer, weights_sha256
from dalle1.data.picture_files import find_pictures
from dalle1.evaluation.likelihood import token_nats
from dalle1.models.dvae import DVAE
from dalle1.models.transformer import DalleTransformer
from dalle1.pipeline import Pipeline
from dalle1.results import Choice, SampleRun
from dalle1.run_origin import RunOrigin
from dalle1.sampling.filters import DEFAULT_SAMPLING
from dalle1.score import format_scores, main, score_files
from dalle1.tokenizers.text import TextTokenizer

RED, BLUE, STARS = "a red circle", "a blue square on the left", "two green stars"


def save(path: Path, caption: str | None = None, *, width: int = 16, height: int = 12, seed: int = 0) -> Path:
    """A picture, by default as large as the tiny transformer's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    return path


@pytest.fixture
def run(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Calls the command in `tmp_path` and returns the directory that it writes to; `code` is its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, code: int = 0, transformer: Path = checkpoints["transformer"]) -> Path:
        words = [*map(str, arguments), f"transformer={transformer}", f"dvae={checkpoints['dvae']}", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["score", *words, "out=result"])
        if code:
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == code
        else:
            main()
        return tmp_path / "result"

    return call


@pytest.fixture
def guided(
    tmp_path: Path,
    make_transformer: Callable[..., DalleTransformer],
    make_dvae: Callable[..., DVAE],
    text_tokenizer: TextTokenizer,
    write_checkpoint: Callable[..., Path],
) -> Path:
    """The same transformer, as if it had been trained with caption dropout."""
    return write_checkpoint(
        tmp_path / "guided" / "last.ckpt",
        make_transformer(),
        text_tokenizer=text_tokenizer,
        dvae_sha256=weights_sha256(make_dvae().state_dict()),
        caption_dropout=0.1,
    )


def read_rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "scores.csv").read_text(encoding="utf-8").splitlines()))


def read_json(out: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    return content


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def independent_nats(checkpoints: dict[str, Path], path: Path, caption: str | None) -> tuple[Tensor, Tensor]:
    """Nats of the caption's tokens and its end, and of the image tokens (gh, gw); of a picture of the right size."""
    transformer, dvae = load_transformer(checkpoints["transformer"]), load_dvae(checkpoints["dvae"]).model
    assert transformer.text_tokenizer is not None
    with Image.open(path) as picture:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        image_tokens = dvae.encode(image)
        ids = transformer.text_tokenizer.ids(caption) if caption else []
        text = torch.tensor([*ids, *range(300 + len(ids), 340)])
        text_logits, image_logits = transformer.model(text[None], image_tokens.flatten(1))
    told = len(ids) + 1
    text_nats = F.cross_entropy(text_logits[0, :told], text[:told], reduction="none")
    return text_nats, F.cross_entropy(image_logits[0], image_tokens.flatten(), reduction="none").view(3, 4)


def test_numbers_are_those_of_an_independent_computation(
    run: Callable[..., Path], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    path = save(tmp_path / "a.png", RED)
    out = run("a.png")
    assert names(out) == {"a.png", "a.npy", "scores.csv", "scores.json"}

    text, image = independent_nats(checkpoints, path, RED)
    (row,) = read_rows(out)
    assert (row["name"], row["source"], row["caption"]) == ("a", "a.png", RED)
    assert float(row["text_nats"]) == pytest.approx(float(text.sum()), rel=1e-4)
    assert int(row["text_tokens"]) == len(text)
    assert float(row["text_nats_per_token"]) == pytest.approx(float(text.mean()), rel=1e-4)
    assert float(row["image_nats"]) == pytest.approx(float(image.sum()), rel=1e-4)
    assert float(row["image_nats_per_token"]) == pytest.approx(float(image.mean()), rel=1e-4)
    assert (row["caption_gain_nats"], row["probability"]) == ("", "")
    grid = np.load(out / "a.npy")
    assert grid.dtype == np.float32
    np.testing.assert_allclose(grid, image.numpy(), rtol=1e-4)


def test_gain_of_a_caption_is_what_image_nats_are_more_without_it(
    run: Callable[..., Path], tmp_path: Path, checkpoints: dict[str, Path], guided: Path
) -> None:
    path = save(tmp_path / "a.png", RED)
    (row,) = read_rows(run("a.png", transformer=guided))
    with_caption, without = (independent_nats(checkpoints, path, caption)[1].sum() for caption in (RED, None))
    assert float(row["image_nats"]) == pytest.approx(float(with_caption), rel=1e-4)
    assert float(row["caption_gain_nats"]) == pytest.approx(float(without - with_caption), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_best_of_several_captions_has_the_fewest_image_nats(
    run: Callable[..., Path],
    tmp_path: Path,
    checkpoints: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    guided: Path,
    batch_size: int,
) -> None:
    paths = [save(tmp_path / f"{seed}.png", "not this one", seed=seed) for seed in (0, 1)]
    (tmp_path / "captions.txt").write_text(f"{RED}\n\n{BLUE}\n  {STARS}\n{RED}\n", encoding="utf-8")
    out = run(*paths, "captions=captions.txt", f"batch_size={batch_size}", transformer=guided)

    rows = read_rows(out)
    assert [(row["name"], row["caption"]) for row in rows] == [
        (name, caption) for name in ("0", "1") for caption in (RED, BLUE, STARS)
    ]
    best = {}
    for i, path in enumerate(paths):
        grids = torch.stack([independent_nats(checkpoints, path, caption)[1] for caption in (RED, BLUE, STARS)])
        np.testing.assert_allclose(np.load(out / f"{i}.npy"), grids.numpy(), rtol=1e-4)
        likelihoods = (-grids.double().sum((1, 2))).exp()
        expected = (likelihoods / likelihoods.sum()).tolist()
        assert [float(row["probability"]) for row in rows[3 * i : 3 * i + 3]] == pytest.approx(expected, abs=1e-4)
        best[str(path)] = (RED, BLUE, STARS)[int(likelihoods.argmax())]
    content = read_json(out)
    assert content["best_captions"] == best
    best_rows = [row for row in rows if best[row["source"]] == row["caption"]]
    assert content["means"]["image_nats"] == pytest.approx(np.mean([float(row["image_nats"]) for row in best_rows]))  # type: ignore[index]
    printed = capsys.readouterr().out.splitlines()
    for path in paths:
        (line,) = [line for line in printed if line.startswith(str(path))]
        assert best[str(path)] in line


def test_pictures_of_shards_and_files_have_their_own_captions(run: Callable[..., Path], tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.jpg", RED)
    data = save(tmp_path / "b.png").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("deep/a.png", data), ("deep/a.txt", BLUE.encode()), ("c.png", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    out = run("in", "x.tar", code=1)
    assert [(row["name"], row["source"], row["caption"]) for row in read_rows(out)] == [
        ("a", "in/a.jpg", RED),
        ("a-2", "x.tar/deep/a", BLUE),
    ]
    assert list(read_json(out)["failed"]) == ["x.tar/c"]  # type: ignore[call-overload]


def test_sampled_picture_has_its_prompt_and_its_tokens(
    run: Callable[..., Path], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    pipeline = Pipeline.from_checkpoint(transformer=checkpoints["transformer"], dvae=checkpoints["dvae"])
    (result,) = pipeline(["ein grüner Kreis"], candidates=4)
    assert not torch.equal(pipeline.image_tokenizer.encode(result.images), result.image_tokens), "or nothing is shown"
    origin = RunOrigin.of(
        pipeline,
        [result.prompt],
        seed=0,
        sampling=DEFAULT_SAMPLING,
        negative_prompt=None,
        image_prompt=None,
        dtype=torch.float32,
    )
    choice = Choice(sampled=4, keep=None, reranker=None, paste_kept=False)
    SampleRun.open(tmp_path / "run", origin, checkpoints=pipeline.checkpoints).write(0, result, choice)
    rows = read_rows(run(f"{tmp_path}/run/0001*.png"))
    assert [row["caption"] for row in rows] == ["ein grüner Kreis"] * 4
    tokenizer = pipeline.transformer.text_tokenizer
    assert tokenizer is not None
    nats = token_nats(pipeline.transformer.model, tokenizer.encode([result.prompt] * 4), result.image_tokens)
    expected = nats.image.sum((1, 2)).tolist()
    assert [float(row["image_nats"]) for row in rows] == pytest.approx(expected, rel=1e-5)


def test_caption_beside_a_file_goes_before_its_prompt(run: Callable[..., Path], tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("prompt", STARS)
    info.add_text("dvae_sha256", "0")
    Image.new("RGB", (16, 12)).save(tmp_path / "a.png", pnginfo=info)
    (tmp_path / "a.txt").write_text(BLUE)
    assert [row["caption"] for row in read_rows(run("a.png"))] == [BLUE]


def test_given_caption_stands_for_all_pictures(run: Callable[..., Path], tmp_path: Path) -> None:
    save(tmp_path / "a.png", BLUE)
    save(tmp_path / "b.png")
    out = run("a.png", "b.png", f"caption= {RED}")
    assert [row["caption"] for row in read_rows(out)] == [RED, RED]
    assert np.load(out / "a.npy").shape == (3, 4)
    assert {row["probability"] for row in read_rows(out)} == {""}


def test_prompt_of_another_program_is_no_caption(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngInfo()
    info.add_text("prompt", '{"3": {"class_type": "KSampler"}}')
    Image.new("RGB", (16, 12)).save(tmp_path / "a.png", pnginfo=info)
    run("a.png", code=1)
    assert "cannot score 'a.png': it has no caption" in capsys.readouterr().err


def test_picture_of_any_size_is_seen_as_its_centre(run: Callable[..., Path], tmp_path: Path) -> None:
    small = save(tmp_path / "small.png", RED)
    # 4 times as large, with a frame that the crop leaves out.
    with Image.open(small) as picture:
        large = Image.new("RGB", (64 + 30, 48), "red")
        large.paste(picture.resize((64, 48), Image.Resampling.NEAREST), (15, 0))
    large.save(tmp_path / "large.png")
    (tmp_path / "large.txt").write_text(RED)
    out = run("small.png", "large.png")
    assert np.array_equal(np.load(out / "small.npy"), np.load(out / "large.npy"))


def test_page_shows_the_picture_as_its_tokens_and_a_square_for_each_token(
    run: Callable[..., Path], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    path = save(tmp_path / "a.png", RED)
    out = run("a.png")
    dvae = load_dvae(checkpoints["dvae"]).model
    with Image.open(path) as picture:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    seen = (dvae.decode(dvae.encode(image))[0] * 255).round().byte()
    with Image.open(out / "a.png") as opened:
        page = np.asarray(opened.convert("RGB"))
    colors = {tuple(color) for color in page.reshape(-1, 3).tolist()}
    assert {tuple(color) for color in seen.flatten(1).T.tolist()} <= colors

    import matplotlib

    nats = np.load(out / "a.npy")
    heat = matplotlib.colormaps["inferno"]((nats / math.log(32)).clip(0, 1), bytes=True)[..., :3]
    # 12 x 16 pixels are enlarged 20 times, so a token has 80 x 80; the panel stands to the right of the picture.
    top = np.argwhere((page[:, 336] == heat[0, 0]).all(axis=1))[0, 0]
    squares = page[top : top + 240, 336 : 336 + 320]
    assert np.array_equal(squares, heat.repeat(80, axis=0).repeat(80, axis=1))


def test_transformer_with_caption_dropout_shows_the_picture_without_a_caption_too(
    run: Callable[..., Path], tmp_path: Path, guided: Path
) -> None:
    save(tmp_path / "a.png", RED)
    with Image.open(run("a.png", transformer=guided) / "a.png") as page:
        assert page.width == 3 * (320 + 8) + 8


def test_settings_and_hashes_of_the_weights_are_written(
    run: Callable[..., Path], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    save(tmp_path / "a.png", RED)
    content = read_json(run("a.png", "batch_size=3"))
    assert content["settings"] == {
        "transformer": str(checkpoints["transformer"]),
        "dvae": str(checkpoints["dvae"]),
        "caption": None,
        "captions": None,
        "batch_size": 3,
        "background": "white",
    }
    hashes = {
        name: load(checkpoints[name]).sha256 for name, load in (("transformer", load_transformer), ("dvae", load_dvae))
    }
    assert content["checkpoints"] == {
        "transformer": {"sha256": hashes["transformer"], "step": 7},
        "dvae": {"sha256": hashes["dvae"]},
    }


def test_means_are_over_pictures_and_those_per_token_over_tokens(run: Callable[..., Path], tmp_path: Path) -> None:
    for seed, caption in enumerate((RED, BLUE, STARS)):
        save(tmp_path / "in" / f"{seed}.png", caption, seed=seed)
    out = run("in", "batch_size=2")
    rows = read_rows(out)
    text, tokens, image = (
        np.array([float(row[name]) for row in rows]) for name in ("text_nats", "text_tokens", "image_nats")
    )
    assert read_json(out)["means"] == pytest.approx(
        {
            "text_nats": text.mean(),
            "image_nats": image.mean(),
            "text_nats_per_token": text.sum() / tokens.sum(),
            "image_nats_per_token": image.mean() / 12,
        }
    )


@pytest.mark.parametrize(
    ("name", "content", "caption", "reason"),
    [
        ("bad.png", b"no picture", RED, "it is not a JPEG, PNG or WebP file"),
        ("bare.png", None, None, "it has no caption; give caption=..., or write one into a .txt file of its name"),
        ("long.png", None, "a red circle " * 30, "caption must have at most 40 tokens, got "),
        ("empty.png", None, " ", "caption must not be empty"),
    ],
)
def test_bad_pictures_and_captions_are_told_and_the_others_go_on(
    run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    caption: str | None,
    reason: str,
) -> None:
    save(tmp_path / "in" / "good.png", RED)
    bad = save(tmp_path / "in" / name, caption)
    if content is not None:
        bad.write_bytes(content)
    out = run("in", code=1)
    printed = capsys.readouterr()
    assert f"cannot score 'in/{name}': {reason}" in printed.err
    assert "1 could not be scored" in printed.out
    assert list(read_json(out)["failed"]) == [f"in/{name}"]  # type: ignore[call-overload]
    assert [row["name"] for row in read_rows(out)] == ["good"]
    assert names(out) == {"good.png", "good.npy", "scores.csv", "scores.json"}


def test_caption_file_that_is_no_text_is_told(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    run("a.png", code=1)
    assert "its caption must be UTF-8 text, 'a.txt' is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "no picture, folder or shard at 'none.png'"),
        (["a.png", "batch_size=0"], "batch_size must be >= 1, got 0"),
        (["a.png", "background=mud"], "a colour must be a name such as 'white', or '#rrggbb', got 'mud'"),
        (["a.png", "device=abacus"], "device must be auto or one that PyTorch can use here, got 'abacus'"),
        (["a.png", "out=full"], "out must not exist yet or be an empty directory, got 'full'"),
        (["a.png", "transformer=none.ckpt"], "no transformer at 'none.ckpt'"),
        (["a.png", "dvae=other.ckpt"], "the transformer needs the dVAE it was trained with"),
        (["a.png", "caption=a", "captions=empty.txt"], "give either caption=... or captions=FILE, got both"),
        (["a.png", "caption="], "caption must not be empty"),
        (["a.png", "caption=" + "x y " * 30], "caption must have at most 40 tokens, got "),
        (["a.png", "captions=none.txt"], "captions must be a text file with one caption per line, there is none at"),
        (["a.png", "captions=empty.txt"], "captions must hold at least one caption, 'empty.txt' holds none"),
        (["bad.png"], "at least one picture must be good, got 1 that cannot be scored"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_nothing_behind(
    arguments: list[str],
    message: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_dvae: Callable[..., DVAE],
    write_checkpoint: Callable[..., Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png", RED)
    save(tmp_path / "full" / "b.png")
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("\n \n")
    write_checkpoint(tmp_path / "other.ckpt", make_dvae(seed=5))
    before = names(tmp_path)
    others = [
        f"{name}={checkpoints[name]}"
        for name in ("transformer", "dvae")
        if not any(argument.startswith(name) for argument in arguments)
    ]
    out = [] if "out=full" in arguments else ["out=result"]
    monkeypatch.setattr(sys, "argv", ["score", *arguments, *others, *out])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert names(tmp_path) == before


def test_default_directory_is_named_after_the_picture(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a.png", RED)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(run_directory / "runs" / "shapes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["score", "a.png", "device=cpu"])
    main()
    (out,) = (tmp_path / "runs" / "scores").iterdir()
    assert out.name.startswith("a-")
    assert f"pictures: runs/scores/{out.name}" in capsys.readouterr().out


def test_table_names_only_the_columns_that_there_are(
    checkpoints: dict[str, Path], guided: Path, tmp_path: Path
) -> None:
    files = find_pictures([str(save(tmp_path / "a.png", RED))])
    tables = []
    for transformer, captions in ((checkpoints["transformer"], None), (guided, [RED, BLUE])):
        pipeline = Pipeline.from_checkpoint(transformer=transformer, dvae=checkpoints["dvae"])
        tables.append(format_scores(score_files(files, pipeline, tmp_path / "out", captions=captions)))
    heads = [table.splitlines()[0] for table in tables]
    assert ["caption gain" in head for head in heads] == [False, True]
    assert ["probability" in head for head in heads] == [False, True]


def test_no_captions_are_not_each_pictures_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pipeline = Pipeline.from_checkpoint(transformer=checkpoints["transformer"], dvae=checkpoints["dvae"])
    files = find_pictures([str(save(tmp_path / "a.png", RED))])
    with pytest.raises(ValueError, match="captions must hold at least one caption, got none"):
        score_files(files, pipeline, tmp_path / "out", captions=[])


def test_interrupted_run_leaves_the_pictures_that_are_done(
    run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / f"{name}.png", BLUE)
    read = Path.read_bytes

    def interrupt(path: Path) -> bytes:
        if path.name == "c.png":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", interrupt)
    out = run("a.png", "b.png", "c.png", "batch_size=1", code=130)
    assert [row["name"] for row in read_rows(out)] == ["a", "b"]
    assert read_json(out)["interrupted"] is True
    assert "interrupted: these are the pictures that were done" in capsys.readouterr().err


def test_long_table_is_cut(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(23):
        save(tmp_path / f"{number:02d}.png", BLUE)
    out = run(*(f"{number:02d}.png" for number in range(23)))
    printed = capsys.readouterr().out
    assert "19.png" in printed
    assert "20.png" not in printed
    assert "... and 3 more, in scores.csv" in printed
    assert len(read_rows(out)) == 23
