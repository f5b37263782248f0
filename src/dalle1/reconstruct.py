"""What a trained dVAE makes of pictures: `python -m dalle1.reconstruct IMAGES... [name=RUN] [out=DIR]`.

IMAGES are files, folders, globs and .tar shards; pictures may have any size. For each, `<name>.png` shows the
original, its reconstruction and its tokens side by side, and `<name>.npy` is the token grid. Errors are in
`metrics.csv`; `metrics.json` has them too, their means, and how all pictures together use the codebook.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from dalle1.atomic_files import atomic, check_directory, write_json
from dalle1.checkpoint import load_dvae
from dalle1.cli import dashed_options, errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.data.picture_files import PictureFile, find_pictures, printable, unique_names
from dalle1.data.transforms import decode_image, parse_color, to_pixels, to_unit_interval
from dalle1.evaluation.codebook_usage import CodebookUsage, codebook_usage
from dalle1.evaluation.image_quality import SSIM_SMALLEST_SIDE, psnr_db, squared_error, ssim
from dalle1.evaluation.pictures import save_picture, to_pictures, token_maps
from dalle1.models.dvae import DVAE
from dalle1.picture_grid import GridBlock, draw_page
from dalle1.pipeline import choose_device
from dalle1.results import new_directory
from dalle1.run_models import add_name_argument, choose_models, default_model


@dataclass(frozen=True, kw_only=True)
class PictureResult:
    """One picture's row in `metrics.csv`."""

    name: str  # of its files, without extension
    source: str
    height: int  # pixels
    width: int
    grid_height: int  # tokens
    grid_width: int
    codes_used: int
    mse: float
    psnr_db: float
    ssim: float | None  # None for sides below 11 pixels


@dataclass(frozen=True, kw_only=True)
class Reconstructions:
    """What a run gave."""

    pictures: list[PictureResult]
    failed: dict[str, str]  # source -> what is wrong with it
    usage: CodebookUsage  # over all pictures

    def means(self) -> dict[str, float]:
        """Mean errors, each over the pictures that have it."""
        columns = {name: [getattr(item, name) for item in self.pictures] for name in ("mse", "psnr_db", "ssim")}
        known = {name: [value for value in values if value is not None] for name, values in columns.items()}
        return {name: float(np.mean(values)) for name, values in known.items() if values}


@torch.inference_mode()
def reconstruct(dvae: DVAE, image: Float[Tensor, "3 h w"]) -> tuple[Float[Tensor, "3 h w"], Int[Tensor, "gh gw"]]:
    """A picture of any size in [0, 1] after encoding and decoding, and its tokens.

    It is padded to the right and below with copies of its last column and row up to a multiple of the dVAE's
    downsampling, and cropped again."""
    height, width = image.shape[-2:]
    factor = dvae.config.downsampling
    tokens = dvae.encode(F.pad(image[None], (0, -width % factor, 0, -height % factor), mode="replicate"))
    return dvae.decode(tokens)[0, :, :height, :width], tokens[0]


def reconstruct_files(
    files: Sequence[PictureFile],
    dvae: DVAE,
    out: Path,
    *,
    device: torch.device,
    side: int | None = None,
    background: str = "white",
) -> Reconstructions:
    """Reconstruct pictures one by one and write `<name>.png` and `<name>.npy` of each into `out`.

    Pictures that cannot be read, or do not fit into memory, are told on stderr and passed over.

    Args:
        files: Undecoded pictures.
        dvae: In evaluation mode.
        out: Directory, made when it is needed.
        device: Where the dVAE works.
        side: Pictures whose short side is longer are shrunk to it first, in pixels; None keeps their size.
        background: What transparent parts of pictures show, a colour as `transforms.parse_color` takes it.

    Raises: ValueError if there is no picture that can be reconstructed, if `side` < 1 or `background` is no colour.
    """
    if side is not None:
        require_int("side", side, at_least=1)
    parse_color(background)
    dvae = dvae.to(device)
    counts = torch.zeros(dvae.config.vocab_size, dtype=torch.int64)
    pictures, failed = [], {}
    for name, file in tqdm(list(zip(unique_names(files), files, strict=True)), unit="picture", disable=None):
        source = printable(file.source)
        try:
            image = _read(file, side, background).to(device)
            seen, tokens = reconstruct(dvae, image)
            tokens = tokens.cpu()
            result = _measure(name, source, image, seen, tokens)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failed[source] = _reason(error)
            tqdm.write(f"cannot reconstruct '{source}': {failed[source]}", file=sys.stderr)
            continue
        counts += torch.bincount(tokens.flatten(), minlength=len(counts))
        _write(result, image, seen, tokens, out, dvae)
        pictures.append(result)
    if not pictures:
        raise ValueError(f"at least one picture must be good, got {len(failed)} that cannot be reconstructed")
    return Reconstructions(pictures=pictures, failed=failed, usage=codebook_usage(counts))


def _read(file: PictureFile, side: int | None, background: str) -> Float[Tensor, "3 h w"]:
    picture = decode_image(file.read(), background)
    shorter = min(picture.size)
    if side is not None and shorter > side:
        width, height = (max(1, round(length * side / shorter)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
    return to_unit_interval(to_pixels(picture))


def _reason(error: Exception) -> str:
    """What is wrong with a picture, in one line. Raises: the error itself if it is a mistake of ours."""
    if isinstance(error, RuntimeError | MemoryError):
        # How the allocators of GPUs and of the CPU begin.
        lacks_memory = any(words in str(error) for words in ("out of memory", "can't allocate memory"))
        if not lacks_memory and isinstance(error, RuntimeError):
            raise error
        return "it needs more memory than the device has; shrink it with side="
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _measure(name: str, source: str, image: Tensor, seen: Tensor, tokens: Tensor) -> PictureResult:
    height, width = image.shape[-2:]
    error = squared_error(seen[None], image[None])
    has_ssim = min(height, width) >= SSIM_SMALLEST_SIDE
    return PictureResult(
        name=name,
        source=source,
        height=height,
        width=width,
        grid_height=tokens.shape[0],
        grid_width=tokens.shape[1],
        codes_used=np.unique(tokens.numpy()).size,
        mse=float(error),
        psnr_db=float(psnr_db(error)),
        ssim=float(ssim(seen[None], image[None])) if has_ssim else None,
    )


def _write(result: PictureResult, image: Tensor, seen: Tensor, tokens: Tensor, out: Path, dvae: DVAE) -> None:
    original, reconstruction = to_pictures(torch.stack([image, seen]))
    token_map = token_maps(tokens[None], pixels_per_token=dvae.config.downsampling)[0]
    block = GridBlock(
        title=result.name,
        pictures=[original, reconstruction, token_map.crop((0, 0, result.width, result.height))],
        captions=[
            f"original, {result.width} x {result.height}",
            f"reconstruction, {result.psnr_db:.1f} dB",
            f"tokens, {result.grid_width} x {result.grid_height}",
        ],
        columns=3,
    )
    save_picture(draw_page([block]), out / f"{result.name}.png")
    small = np.uint16 if dvae.config.vocab_size <= 2**16 else np.int32
    with atomic(out / f"{result.name}.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, tokens.numpy().astype(small))


def write_metrics(results: Reconstructions, out: Path, *, settings: dict[str, Any]) -> None:
    """Write `metrics.csv`, a row for each picture, and `metrics.json` with all that was found."""
    names = [field.name for field in fields(PictureResult)]
    with atomic(out / "metrics.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(item) for item in results.pictures)
    usage = results.usage
    content = {
        "settings": settings,
        "means": results.means(),
        "codes_used_share": usage.used_share,
        "code_perplexity": usage.perplexity,
        "dead_codes": usage.n_dead,
        "failed": results.failed,
        "pictures": [asdict(item) for item in results.pictures],
    }
    write_json(out / "metrics.json", content)


def format_results(results: Reconstructions) -> str:
    """The table that the command prints."""
    rows = [
        (item.source, f"{item.width}x{item.height}", f"{item.psnr_db:.2f}", _written(item.ssim), str(item.codes_used))
        for item in results.pictures
    ]
    means = results.means()
    rows.append((f"mean of {len(rows)}", "", f"{means['psnr_db']:.2f}", _written(means.get("ssim")), ""))
    table = tabulate(rows, headers=("picture", "pixels", "PSNR (dB)", "SSIM", "codes"), disable_numparse=True)
    failed = f"\n{len(results.failed)} could not be reconstructed" if results.failed else ""
    return f"{table}\nof these pictures alone: {results.usage}{failed}"


def _written(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@errors_in_one_line()
def main() -> None:
    """Command line; exit code 1 if a picture could not be reconstructed."""
    parser = argparse.ArgumentParser(
        prog="python -m dalle1.reconstruct",
        description=__doc__,
        epilog="Options may also be written without dashes: ckpt=PATH.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs, .tar shards")
    add_name_argument(parser)
    parser.add_argument("--ckpt", metavar="PATH", help=f"the dVAE (default: {default_model('dvae')})")
    parser.add_argument("--out", help="directory to write to (default: runs/reconstructions/<name>-<time>)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--side", type=int, help="shrink pictures to this short side first, in pixels")
    parser.add_argument("--background", default="white", help="what transparent parts show (default: %(default)s)")
    arguments = dashed_options(sys.argv[1:], ("name", "ckpt", "out", "device", "side", "background"))
    options = parser.parse_intermixed_args(arguments)
    choose_models(options, ckpt="dvae")
    files = find_pictures(options.images)
    device = choose_device(options.device)
    loaded = load_dvae(options.ckpt)
    name = f"{len(files)}-pictures" if len(files) > 1 else next(unique_names(files))
    out = check_directory(options.out) if options.out else new_directory("runs/reconstructions", name)
    how: dict[str, Any] = {"side": options.side, "background": options.background}
    results = reconstruct_files(files, loaded.model, out, device=device, **how)
    write_metrics(results, out, settings={"ckpt": options.ckpt, "sha256": loaded.sha256, "step": loaded.step, **how})
    print(format_results(results))
    print(f"pictures: {out}")
    if results.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
