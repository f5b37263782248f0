"""`python -m dalle1.reconstruct`: what it writes for pictures of any size, and what it says of bad ones."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1 import reconstruct as module
from dalle1.checkpoint import load_dvae, make_record, write_exported
from dalle1.data.picture_files import PictureFile, find_pictures
from dalle1.evaluation.image_quality import psnr_db, squared_error, ssim
from dalle1.models.dvae import DVAE
from dalle1.reconstruct import format_results, main, reconstruct, reconstruct_files

CPU = torch.device("cpu")


def save(path: Path, width: int, height: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Calls the command in `tmp_path` and returns the directory that it writes to; `code` is its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, code: int = 0, ckpt: str | None = None) -> Path:
        words = [*map(str, arguments), f"ckpt={ckpt or checkpoints['dvae']}", "out=result", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["reconstruct", *words])
        if code:
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == code
        else:
            main()
        return tmp_path / "result"

    return call


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(("width", "height"), [(16, 12), (4, 4), (13, 30), (5, 1), (3, 50)])
def test_picture_of_any_size_comes_back_in_its_size(make_dvae: Callable[..., DVAE], width: int, height: int) -> None:
    dvae = make_dvae().requires_grad_(False)
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    seen, tokens = reconstruct(dvae, image)
    assert seen.shape == image.shape
    assert tokens.shape == (-(-height // 4), -(-width // 4))
    # Padded by hand: the last column and row again.
    rows, columns = torch.arange(4 * tokens.shape[0]), torch.arange(4 * tokens.shape[1])
    padded = image[:, rows.clamp(max=height - 1)][:, :, columns.clamp(max=width - 1)][None]
    assert torch.equal(tokens, dvae.encode(padded)[0])
    assert torch.equal(seen, dvae.decode(tokens[None])[0, :, :height, :width])


def test_files_of_a_picture_are_its_tokens_and_all_three_views(
    run: Callable[..., Path], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    out = run(save(tmp_path / "a.png", 21, 14))
    assert names(out) == {"a.png", "a.npy", "metrics.csv", "metrics.json"}

    dvae = load_dvae(checkpoints["dvae"]).model
    with Image.open(tmp_path / "a.png") as picture:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    seen, expected = reconstruct(dvae, image)
    tokens = np.load(out / "a.npy")
    assert (tokens.dtype, tokens.shape) == (np.uint16, (4, 6))
    assert np.array_equal(tokens, expected.numpy())

    (row,) = csv.DictReader((out / "metrics.csv").read_text().splitlines())
    error = squared_error(seen[None], image[None])
    sizes = {"height": "14", "width": "21", "grid_height": "4", "grid_width": "6"}
    assert {name: row[name] for name in sizes} == sizes
    assert float(row["psnr_db"]) == pytest.approx(float(psnr_db(error)))
    assert float(row["ssim"]) == pytest.approx(float(ssim(seen[None], image[None])))
    assert int(row["codes_used"]) == len(expected.unique())
    with Image.open(out / "a.png") as page:
        pixels = {tuple(color) for color in np.asarray(page.convert("RGB")).reshape(-1, 3).tolist()}
    originals = {tuple(color) for color in (image * 255).round().byte().flatten(1).T.tolist()}
    assert originals <= pixels, "the original is on it, pixel for pixel"


def test_grid_of_a_large_codebook_needs_wider_numbers(
    run: Callable[..., Path],
    tmp_path: Path,
    make_dvae: Callable[..., DVAE],
    write_checkpoint: Callable[..., Path],
) -> None:
    large = write_checkpoint(tmp_path / "large.ckpt", make_dvae(vocab_size=2**16 + 1))
    out = run(save(tmp_path / "a.png", 8, 8), ckpt=str(large))
    assert np.load(out / "a.npy").dtype == np.int32


def test_exported_directory_is_a_checkpoint_too(
    run: Callable[..., Path], tmp_path: Path, make_dvae: Callable[..., DVAE]
) -> None:
    dvae = make_dvae()
    write_exported(tmp_path / "exported", dvae, make_record(dvae), step=0)
    assert names(run(save(tmp_path / "a.png", 8, 8), ckpt="exported")) >= {"a.png", "a.npy"}


def test_folders_globs_and_shards_get_names_of_their_own(run: Callable[..., Path], tmp_path: Path) -> None:
    save(tmp_path / "one" / "a.png", 16, 16, seed=1)
    save(tmp_path / "two" / "A.jpg", 12, 16, seed=2)
    save(tmp_path / "two" / "a-2.webp", 16, 12, seed=3)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("deep/a.png")
        info.size = len(buffer.getvalue())
        tar.addfile(info, io.BytesIO(buffer.getvalue()))

    out = run("one", "two/*", "x.tar")

    content = json.loads((out / "metrics.json").read_text())
    assert [(item["name"], item["source"]) for item in content["pictures"]] == [
        ("a", "one/a.png"),
        ("A-2", "two/A.jpg"),
        ("a-2-2", "two/a-2.webp"),
        ("a-3", "x.tar/deep/a"),
    ]
    assert {"a.npy", "A-2.npy", "a-2-2.npy", "a-3.npy"} <= names(out)


def test_codes_are_counted_over_all_pictures(run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        save(tmp_path / "in" / f"{seed}.png", 16, 16, seed=seed)
    out = run("in")
    used = {code for seed in (0, 1) for code in np.load(out / f"{seed}.npy").flatten().tolist()}
    content = json.loads((out / "metrics.json").read_text())
    assert content["codes_used_share"] == len(used) / 32
    assert content["dead_codes"] == 32 - len(used)
    means = {name: np.mean([item[name] for item in content["pictures"]]) for name in ("mse", "psnr_db", "ssim")}
    assert content["means"] == pytest.approx(means)
    assert content["settings"]["step"] == 7


def test_bad_pictures_are_told_and_the_others_go_on(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "good.png", 16, 16)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no picture")
    out = run("in", code=1)
    assert "good.npy" in names(out)
    printed = capsys.readouterr()
    assert printed.err.count("cannot reconstruct 'in/bad.jpg': ") == 1
    assert "1 could not be reconstructed" in printed.out
    assert json.loads((out / "metrics.json").read_text())["failed"].keys() == {"in/bad.jpg"}
    assert not [name for name in names(out) if name.startswith("bad") or "partial" in name]


def test_without_any_good_picture_nothing_is_written(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    assert not run("bad.jpg", code=1).exists()
    assert "error: at least one picture must be good, got 1 that cannot be reconstructed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "no picture, folder or shard at 'none.png'"),
        (["a.png", "side=0"], "side must be >= 1, got 0"),
        (["a.png", "background=mud"], "a colour must be a name such as 'white', or '#rrggbb', got 'mud'"),
        (["a.png", "device=abacus"], "device must be auto or one that PyTorch can use here, got 'abacus'"),
        (["a.png", "out=full"], "out must not exist yet or be an empty directory, got 'full'"),
        (["a.png", "ckpt=none.ckpt"], "none.ckpt"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str],
    message: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png", 8, 8)
    save(tmp_path / "full" / "b.png", 8, 8)
    ckpt = [] if any("ckpt" in argument for argument in arguments) else [f"--ckpt={checkpoints['dvae']}"]
    monkeypatch.setattr(sys, "argv", ["reconstruct", *arguments, *ckpt])
    with pytest.raises(SystemExit):
        main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in line
    assert names(tmp_path) == {"a.png", "full"}


def test_short_side_is_shrunk_by_averaging_and_never_enlarged(run: Callable[..., Path], tmp_path: Path) -> None:
    save(tmp_path / "wide.png", 64, 32)
    save(tmp_path / "small.png", 9, 13)
    out = run("wide.png", "small.png", "--side", 16)
    sizes = {item["name"]: (item["width"], item["height"]) for item in read_pictures(out)}
    assert sizes == {"wide": (32, 16), "small": (9, 13)}
    assert {item["name"]: item["ssim"] is None for item in read_pictures(out)} == {"wide": False, "small": True}


def test_transparent_parts_show_the_background(run: Callable[..., Path], tmp_path: Path) -> None:
    Image.new("RGBA", (200, 200)).save(tmp_path / "a.png")
    out = run("a.png", "background=#00ff80")
    with Image.open(out / "a.png") as page:
        assert page.convert("RGB").getpixel((60, 100)) == (0, 255, 128)


def read_pictures(out: Path) -> list[dict[str, object]]:
    content: list[dict[str, object]] = json.loads((out / "metrics.json").read_text())["pictures"]
    return content


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("where", ["reconstruct", "squared_error"])
def test_picture_that_does_not_fit_into_memory_is_told(
    make_dvae: Callable[..., DVAE],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    where: str,
) -> None:
    def fail(*arguments: Any) -> object:
        if arguments[-1].shape[-1] > 8:
            raise error
        return work(*arguments)

    work = getattr(module, where)
    monkeypatch.setattr(module, where, fail)
    files = find_pictures([str(save(tmp_path / "large.png", 16, 8)), str(save(tmp_path / "small.png", 8, 8))])
    results = reconstruct_files(files, make_dvae(), tmp_path / "out", device=CPU)
    assert len(results.pictures) == 1
    assert "large.png': it needs more memory than the device has; shrink it with side=" in capsys.readouterr().err


def test_mistake_of_ours_is_not_a_bad_picture(
    make_dvae: Callable[..., DVAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(dvae: DVAE, image: torch.Tensor) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(module, "reconstruct", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        reconstruct_files(find_pictures([str(save(tmp_path / "a.png", 8, 8))]), make_dvae(), tmp_path, device=CPU)


def test_names_that_are_long_or_no_text_can_be_written(make_dvae: Callable[..., DVAE], tmp_path: Path) -> None:
    data = save(tmp_path / "a.png", 8, 8).read_bytes()
    files = [
        PictureFile(source=f"{stem}.png", stem=stem, read=lambda: data) for stem in ("ß" * 120, "ß" * 120, "b\udcff")
    ]
    results = reconstruct_files(files, make_dvae(), tmp_path / "out", device=CPU)
    module.write_metrics(results, tmp_path / "out", settings={})
    assert [len(item.name.encode()) <= 160 for item in results.pictures] == [True] * 3
    assert results.pictures[2].source == "b\\xff.png"
    assert "mean of 3" in format_results(results)
