"""What sample.py does: from its configuration to a directory of pictures."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm

from dalle1.checkpoint import Loaded, check_pair, load_image_tokenizer, load_transformer
from dalle1.data.fields import require_bool, require_int
from dalle1.data.sampled_picture import read_sampled_picture
from dalle1.data.transforms import decode_image
from dalle1.decode_and_rank import decode_and_rank
from dalle1.models.transformer import DalleTransformer
from dalle1.pipeline import Pipeline, choose_device, choose_dtype
from dalle1.preview import Preview
from dalle1.rerank.choose import load_reranker
from dalle1.rerank.reranker import Reranker
from dalle1.results import Choice, RunPart, SampleRun, WrittenRun
from dalle1.run_origin import RunOrigin
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.image_prompt import ImagePrompt
from dalle1.sampling.progress import Progress, ProgressBar
from dalle1.sampling.prompts import read_prompts


def run(cfg: DictConfig) -> WrittenRun:
    """Sample and rank, or rank again, as `cfg` (conf/sample.yaml) asks for.

    Ctrl-C writes the pictures that are done; the same configuration goes on with the rest.

    Raises: ValueError, TypeError or OSError with one sentence for what cannot be done.
    """
    require_int("keep", 1 if cfg.keep is None else cfg.keep, at_least=1)
    require_int("seed", cfg.seed, at_least=0)
    for name in ("paste_kept", "compile", "rerank.allow_download"):
        require_bool(name, OmegaConf.select(cfg, name))
    if cfg.out == "":
        raise ValueError("out must name a directory, got nothing; leave it out for one of its own")
    return _rank_again(cfg) if cfg.rerank.only is not None else _Sampling(cfg).run()


class _Sampling:
    """Loads all that a configuration names, and finds what is wrong with it before anything is written."""

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        picture = _read_picture("image", cfg.image)
        for name in ("mask", "keep_rows", "variations", "paste_kept"):
            if picture is None and cfg[name] not in (None, False):
                raise ValueError(f"{name} says what of a picture stays, so it needs image=..., got none")
        prompts = _prompts(cfg)
        self._candidates = _candidates(cfg)
        if cfg.keep is not None and cfg.keep > self._candidates:
            raise ValueError(f"keep must be at most the number of candidates, {self._candidates}, got {cfg.keep}")
        sampling = sampling_config(cfg)
        self._pipeline = load_pipeline(cfg)
        if cfg.guidance_scale is None:
            sampling = replace(sampling, guidance_scale=self._pipeline.default_guidance_scale)
        self._settings = _settings(cfg) | asdict(sampling)
        image_prompt = None if picture is None else _image_prompt(cfg, self._pipeline, picture)
        what: dict[str, Any] = {
            "seed": cfg.seed,
            "sampling": sampling,
            "negative_prompt": cfg.negative_prompt,
            "image_prompt": image_prompt,
            "dtype": choose_dtype(cfg.precision, self._pipeline.device),
        }
        prompts = self._pipeline.check_prompts(prompts)
        origin = RunOrigin.of(self._pipeline, prompts, **what)
        self._run = SampleRun.open(
            cfg.out if cfg.out is not None else f"runs/{cfg.name}/samples/{origin.name}",
            origin,
            checkpoints=self._pipeline.checkpoints,
            image_prompt=image_prompt,
        )
        self._image_prompt = image_prompt
        reranker = self._pipeline.reranker
        self._reranker = dict(reranker.facts) if reranker else None
        self._preview = None
        if cfg.preview_every is not None:
            path = self._run.directory / "preview.png"
            self._preview = Preview(path, self._pipeline.image_tokenizer, cfg.preview_every)
        self._bar: ProgressBar | None = None
        # What an earlier call has chosen in the same way is neither decoded nor ranked again.
        choice = self._choice(self._candidates)
        self._missing = [i for i in range(len(prompts)) if not self._run.find_written(i, choice)]
        streamed = self._missing or [0]  # arguments are checked in any case
        self._results = self._pipeline.stream(
            [prompts[i] for i in streamed],
            candidates=self._candidates,
            keep=cfg.keep,
            compiled=cfg.compile,
            batch_size=cfg.batch_size,
            store=RunPart(self._run, streamed),
            on_progress=self._on_progress,
            on_finished=self._on_finished,
            **what,
        )

    def _on_progress(self, progress: Progress) -> None:
        if self._bar:
            self._bar.sampled(progress)
        if self._preview:
            self._run.begin()
            self._preview(progress)

    def _on_finished(self, pictures: int) -> None:
        if self._bar:
            self._bar.finished(pictures)

    def run(self) -> WrittenRun:
        """Sample what is not there yet, and write all that is asked for."""
        with sigterm_as_ctrl_c():
            return self._run_to_the_end()

    def _run_to_the_end(self) -> WrittenRun:
        try:
            with ProgressBar() as self._bar:
                for number, result in zip(self._missing, self._results, strict=False):
                    self._run.write(number, result, self._choice(result.sampled))
            return self._finish()
        except KeyboardInterrupt:
            print("interrupted: writing the pictures that are done; again to stop at once", file=sys.stderr)
            self._write_partial_results()
            if self._run.has_pictures:
                print(f"{self._finish(complete=False)}\nthe same command goes on with the rest")
            raise
        except OSError as error:
            directory = self._run.directory
            if not self._run.has_begun:
                raise OSError(f"out must be a directory that can be written to, got '{directory}' ({error})") from error
            raise OSError(f"cannot write to '{directory}' ({error}); {self._what_stays()}") from error
        except torch.OutOfMemoryError as error:
            size = self._cfg.batch_size
            reason = f"sequences decoded at once must fit into the device's memory, batch_size={size} do not"
            raise ValueError(f"{reason}; set a smaller one: {self._what_stays()}") from error
        finally:
            if self._preview:
                self._preview.remove()

    def _what_stays(self) -> str:
        return f"what is done stays in '{self._run.directory}', and the same command goes on with the rest"

    def _choice(self, sampled: int) -> Choice:
        paste_kept = self._image_prompt is not None and self._image_prompt.paste_kept
        return Choice(sampled=sampled, keep=self._cfg.keep, reranker=self._reranker, paste_kept=paste_kept)

    def _write_partial_results(self) -> None:
        """Pictures of prompts that have some of their candidates."""
        for number, prompt in enumerate(self._run.origin.prompts):
            tokens = self._run.load(number)
            if tokens is not None and not self._run.has_written(number):
                result = self._pipeline.decode_and_rank(
                    prompt, tokens[: self._candidates], keep=self._cfg.keep, image_prompt=self._image_prompt
                )
                self._run.write(number, result, self._choice(result.sampled))

    def _finish(self, *, complete: bool = True) -> WrittenRun:
        return self._run.finish(settings=self._settings, reranker=self._reranker, complete=complete)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Clusters stop their jobs with it, and what is done is worth as much then."""
    if threading.current_thread() is not threading.main_thread():  # Python has no handlers elsewhere
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _rank_again(cfg: DictConfig) -> WrittenRun:
    of_sampling = ("prompt", "prompts_file", "negative_prompt", "temperature_end", "preview_every", "out")
    for name in (*of_sampling, "image", "mask", "keep_rows", "variations", "paste_kept"):
        if cfg[name] not in (None, False):
            raise ValueError(f"with rerank.only, which ranks what its directory holds, leave out {name}={cfg[name]}")
    samples = SampleRun.reopen(cfg.rerank.only)
    origin, device = samples.origin, choose_device(cfg.device)
    image_tokenizer = load_image_tokenizer(cfg.dvae)
    if image_tokenizer.sha256 != origin.dvae_sha256:
        raise ValueError(
            f"'{cfg.rerank.only}' was sampled with dVAE {origin.dvae_sha256[:12]}, got {image_tokenizer.sha256[:12]}; "
            "give that one as dvae=..."
        )

    def transformer() -> Loaded[DalleTransformer]:
        loaded = load_transformer(cfg.transformer)
        check_pair(loaded, image_tokenizer)
        return loaded

    reranker = _load_reranker(cfg, transformer)
    if reranker:
        reranker.to(device)
        for prompt in origin.prompts:
            reranker.check(prompt)
    is_complete, image_prompt = samples.is_complete, samples.image_prompt
    keep = samples.settings.get("keep") if cfg.keep is None else cfg.keep
    choice = Choice(
        sampled=0,
        keep=keep,
        reranker=dict(reranker.facts) if reranker else None,
        paste_kept=image_prompt is not None and image_prompt.paste_kept,
    )
    for number, prompt in enumerate(tqdm(origin.prompts, desc="ranking", unit=" prompts", disable=None)):
        tokens = samples.load(number)
        if tokens is not None:
            result = decode_and_rank(
                prompt,
                tokens,
                image_tokenizer=image_tokenizer,
                reranker=reranker,
                keep=keep,
                image_prompt=image_prompt,
                device=device,
            )
            samples.write(number, result, replace(choice, sampled=result.sampled))
    if not samples.has_pictures:
        raise ValueError(f"'{cfg.rerank.only}' must hold sampled pictures, it has none yet; sample first")
    changed = {"rerank": _settings(cfg)["rerank"], "keep": keep}
    return samples.finish(settings=samples.settings | changed, reranker=choice.reranker, complete=is_complete)


def _prompts(cfg: DictConfig) -> list[str]:
    if cfg.prompt is not None or cfg.prompts_file is not None or cfg.image is None:
        return read_prompts(cfg.prompt, cfg.prompts_file)
    sampled = read_sampled_picture(Path(cfg.image).read_bytes())
    if sampled is None:
        raise ValueError(f"give prompt=... too: '{cfg.image}' was not sampled here, and has none of its own")
    return [sampled.prompt]


def _candidates(cfg: DictConfig) -> int:
    name = "candidates" if cfg.variations is None else "variations"
    require_int(name, cfg[name], at_least=1)
    return int(cfg[name])


def sampling_config(cfg: DictConfig) -> SamplingConfig:
    """That of a configuration; without guidance if that depends on the transformer."""
    return SamplingConfig(
        temperature=cfg.temperature,
        temperature_end=cfg.temperature_end,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        guidance_scale=1.0 if cfg.guidance_scale is None else cfg.guidance_scale,
    )


def load_pipeline(cfg: DictConfig) -> Pipeline:
    """All models that a configuration names, the largest last, so that whatever else is missing is found at once.

    Raises: ValueError or OSError for what cannot be loaded.
    """

    @cache
    def transformer() -> Loaded[DalleTransformer]:
        return load_transformer(cfg.transformer)

    device = choose_device(cfg.device)
    image_tokenizer = load_image_tokenizer(cfg.dvae)
    reranker = _load_reranker(cfg, transformer)
    return Pipeline(transformer(), image_tokenizer, reranker).to(device)


def _load_reranker(cfg: DictConfig, transformer: Callable[[], Loaded[DalleTransformer]]) -> Reranker | None:
    return load_reranker(
        cfg.rerank.kind,
        model=cfg.rerank.model,
        allow_download=cfg.rerank.allow_download,
        load_transformer=transformer,
    )


def _image_prompt(cfg: DictConfig, pipeline: Pipeline, picture: Image.Image) -> ImagePrompt:
    keep_rows = cfg.keep_rows
    if cfg.variations is not None and keep_rows is None and cfg.mask is None:
        keep_rows = max(1, pipeline.transformer.model.config.grid_height // 2)
    sampled = read_sampled_picture(Path(cfg.image).read_bytes())
    return pipeline.image_prompt(
        picture,
        keep_rows=keep_rows,
        mask=_read_picture("mask", cfg.mask),
        paste_kept=cfg.paste_kept,
        sampled=sampled,
    )


def _read_picture(option: str, path: str | None) -> Image.Image | None:
    if path is None:
        return None
    try:
        # What a mask does not cover stays: transparent is black.
        return decode_image(Path(path).read_bytes(), "black" if option == "mask" else "white")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option} must be a picture, there is none at '{path}'") from error
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{option} must be a JPEG, PNG or WebP file, '{path}' cannot be read: {reason}") from error


def _settings(cfg: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict), "it is one in the file"
    return {str(name): value for name, value in content.items()}
