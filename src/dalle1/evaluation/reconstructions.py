"""What a dVAE makes of many pictures, as numbers: errors, likelihoods, code usage, features of the reconstructions."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.checkpoint import Loaded
from dalle1.evaluation.chunks import CHUNK_SIZE, Chunks, compute_chunks
from dalle1.evaluation.codebook_usage import codebook_usage
from dalle1.evaluation.extractors import Extractor, of_one_size
from dalle1.evaluation.feature_sets import PICTURES_AT_ONCE, FeatureSet, Numbers, tensors_of
from dalle1.evaluation.image_quality import SSIM_SMALLEST_SIDE, psnr_db, squared_error, ssim
from dalle1.evaluation.picture_sets import PictureSet, Treatment
from dalle1.evaluation.pictures import to_uint8
from dalle1.evaluation.ranks import Ranks
from dalle1.losses import logit_laplace_nll
from dalle1.models.dvae import DVAE, reconstruction
from dalle1.models.pixels import map_pixels


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How likelihoods are computed."""

    min_log_scale: float  # floor on ln b, see `losses.logit_laplace_nll`; that of training
    temperature: float  # of the relaxation
    seed: int  # of its noise

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if math.isnan(self.min_log_scale) or self.min_log_scale == math.inf:
            raise ValueError(f"min_log_scale must be a number or -inf, got {self.min_log_scale}")


def reconstruct_all(
    pictures: PictureSet,
    dvae: Loaded[DVAE],
    extractors: Sequence[Extractor],
    treatment: Treatment,
    likelihood: Likelihood,
    *,
    cache: Path,
    ranks: Ranks,
    chunk_size: int = CHUNK_SIZE,
) -> Chunks:
    """Errors and likelihoods of each picture, counts of codes, and features of the reconstructions.

    Raises: ValueError or OSError with one sentence if a picture cannot be read.
    """

    def compute(numbers: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        device = dvae.model.codebook.device
        counts = torch.zeros(1, dvae.model.config.vocab_size, dtype=torch.int64)
        features = defaultdict(list)
        number = numbers.start
        for group in pictures.decoded(numbers, treatment, at_once=PICTURES_AT_ONCE):
            seen = []
            for same in of_one_size(group):
                noise = [_noise(likelihood.seed, i, device) for i in range(number, number + len(same))]
                pixels, tokens, errors = _reconstruct(dvae.model, same, likelihood, noise)
                number += len(same)
                seen += list(pixels)
                counts += torch.bincount(tokens.flatten(), minlength=counts.shape[1])
                for name, values in errors.items():
                    parts[name].append(values)
            for extractor in extractors:
                features[extractor.name].append(extractor(seen))
        tensors = {name: torch.cat(values) for name, values in parts.items()} | {"code_counts": counts}
        for name, of_groups in features.items():
            tensors |= tensors_of(of_groups, prefix=f"{name}.")
        return tensors

    recipe = {
        "what": "reconstructions",
        "pictures": pictures.sha256,
        "dvae": dvae.sha256,
        "extractors": [extractor.name for extractor in extractors],
        "treatment": treatment.facts,
        "likelihood": {name: str(value) for name, value in vars(likelihood).items()},  # JSON has no -inf
        "at_once": PICTURES_AT_ONCE,
    }
    return compute_chunks(
        compute, len(pictures), recipe=recipe, cache=cache, ranks=ranks, label="reconstructions", chunk_size=chunk_size
    )


def reconstructed_features(chunks: Chunks, extractor: Extractor, treatment: Treatment) -> FeatureSet:
    """The features of an extractor in what `reconstruct_all` gave."""
    return FeatureSet(
        extractor=extractor.name,
        n_features=extractor.n_features,
        treatment=treatment,
        chunks=chunks,
        prefix=f"{extractor.name}.",
    )


def quality(chunks: Chunks, likelihood: Likelihood, *, vocab_size: int) -> Numbers:
    """Mean errors over pictures, and how all of them together use the codebook."""
    tensors = chunks.load()
    what = f"n={chunks.n}"
    of_hard = f"{what},floor={likelihood.min_log_scale:g}"
    of_relaxed = f"temperature={likelihood.temperature:g}"
    names = {
        "mse": what,
        "psnr_db": what,
        "nats_per_dim": of_hard,
        "relaxed_mse": f"{what},{of_relaxed}",
        "relaxed_psnr_db": f"{what},{of_relaxed}",
        "relaxed_nats_per_dim": f"{of_hard},{of_relaxed}",
    }
    values = {f"{name}[{of}]": float(tensors[name].double().mean()) for name, of in names.items()}
    notes = []
    known = tensors["ssim"][tensors["ssim"].isfinite()].double()
    if len(known):
        values[f"ssim[n={len(known)}]"] = float(known.mean())
    if len(known) < chunks.n:
        notes.append(f"SSIM needs sides of {SSIM_SMALLEST_SIDE} pixels, {chunks.n - len(known)} pictures have less")
    usage = codebook_usage(tensors["code_counts"].sum(0))
    values |= {
        f"codes_used[{what},vocab={vocab_size}]": float(usage.n_used),
        f"codes_used_share[{what},vocab={vocab_size}]": usage.used_share,
        f"code_perplexity[{what},vocab={vocab_size}]": usage.perplexity,
    }
    return Numbers(values=values, notes=notes)


@torch.inference_mode()
def _reconstruct(
    dvae: DVAE, pixels: Tensor, likelihood: Likelihood, noise: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Reconstructions as uint8 (b, 3, h, w), tokens, and float32 (b,) errors, all on the CPU."""
    image = pixels.to(dvae.codebook.device).float() / 255
    height, width = image.shape[-2:]
    factor = dvae.config.downsampling
    # As `reconstruct` pads pictures of any size, and crops them again.
    padded = F.pad(image, (0, -width % factor, 0, -height % factor), mode="replicate")
    tokens = dvae.encode(padded)
    hard = dvae.decode_vectors(F.embedding(tokens, dvae.codebook))[:, :, :height, :width]
    relaxed, _ = dvae.relaxed(padded, temperature=likelihood.temperature, generator=noise)
    errors = dict(_errors(image, hard, likelihood))
    errors |= {f"relaxed_{name}": value for name, value in _errors(image, relaxed[:, :, :height, :width], likelihood)}
    seen = reconstruction(hard)
    errors["ssim"] = torch.full_like(errors["mse"], math.nan)
    if min(height, width) >= SSIM_SMALLEST_SIDE:
        errors["ssim"] = ssim(seen, image)
    # Extractors see what a file would hold.
    levels = torch.from_numpy(to_uint8(seen)).permute(0, 3, 1, 2)
    return levels, tokens.cpu(), {name: values.cpu() for name, values in errors.items()}


def _errors(image: Tensor, parameters: Tensor, likelihood: Likelihood) -> Iterator[tuple[str, Tensor]]:
    """Of each picture, (b,)."""
    error = squared_error(reconstruction(parameters), image)
    nats = logit_laplace_nll(map_pixels(image), parameters, min_log_scale=likelihood.min_log_scale)
    yield "mse", error
    yield "psnr_db", psnr_db(error)
    yield "nats_per_dim", nats.mean(dim=(1, 2, 3))


def _noise(seed: int, picture: int, device: torch.device) -> torch.Generator:
    """Randomness of its own for each picture, whoever computes it."""
    digest = hashlib.sha256(f"{seed}|{picture}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))
