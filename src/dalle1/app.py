"""A web page on which a model is tried: `python -m dalle1.app name=shapes`; options are in conf/app.yaml."""

from __future__ import annotations

import ipaddress
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from dalle1.cli import run_script
from dalle1.data.fields import require_int
from dalle1.pipeline import Pipeline, choose_dtype
from dalle1.sample import load_pipeline, sampling_config, sigterm_as_ctrl_c
from dalle1.web.asked import Limits
from dalle1.web.kept import Kept
from dalle1.web.studio import Decoding, Studio

_INSTALL = "pip install '.[app]' in the project's directory"
# Options of sample.py that are about files, which the page asks for instead.
_NOT_HERE = ("prompts_file", "image", "mask", "keep_rows", "variations", "preview_every", "out", "rerank.only")
# What the page shows at first, and users change.
_START = ("prompt", "negative_prompt", "candidates", "keep", "seed", "paste_kept")
# What holds for all requests.
_FOR_ALL = ("name", "transformer", "dvae", "rerank", "batch_size", "device", "precision", "compile")
# Connections at once: a browser holds up to six. More are refused, so that they cannot use up the memory.
_MOST_CONNECTIONS = 200


def serve(cfg: DictConfig) -> None:
    """Load what the configuration names and answer until Ctrl-C or SIGTERM.

    Raises: ValueError, TypeError or OSError with one sentence for what cannot be done.
    """
    _follow_checkpoint(cfg)
    for option in _NOT_HERE:
        value = OmegaConf.select(cfg, option)
        if value is not None:
            raise ValueError(f"the page asks for pictures itself and writes no files, so leave out {option}={value}")
    try:
        import uvicorn

        from dalle1.web.server import Server, make_app
    except ModuleNotFoundError as error:
        raise ValueError(f"the page needs FastAPI and uvicorn, {error.name} is missing; {_INSTALL}") from error

    limits = Limits(**cfg.limits)
    require_int("candidates", cfg.candidates, at_least=1)
    if cfg.candidates > limits.candidates:
        raise ValueError(f"candidates must be at most limits.candidates, {limits.candidates}, got {cfg.candidates}")
    hosts = cfg.allowed_hosts
    if not (isinstance(hosts, ListConfig) and all(isinstance(name, str) for name in hosts)):
        raise ValueError(f"allowed_hosts must be a list of names, as [box.example.org], got {hosts}")
    sampling = sampling_config(cfg)
    with _listen(cfg.host, cfg.port) as listener, tempfile.TemporaryDirectory(prefix="dalle1-app-") as directory:
        pipeline = load_pipeline(cfg)
        decoding = Decoding(
            dtype=choose_dtype(cfg.precision, pipeline.device),
            batch_size=cfg.batch_size,
            compiled=cfg.compile,
            preview_share=cfg.preview_share,
        )
        pipeline.check_compiled(cfg.compile)
        kept = Kept(Path(directory), limits.results)
        settings = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(settings, dict), "it is one in the file"
        studio = Studio(pipeline, kept, decoding, {option: settings[option] for option in _FOR_ALL})
        start = {option: settings[option] for option in _START} | asdict(sampling)
        start["guidance_scale"] = _guidance_scale(cfg, pipeline)
        server = Server(studio, pipeline, kept, limits=limits, start=start)

        class Quick(uvicorn.Server):
            """Does not wait for requests that are worked on, when it is to end."""

            def handle_exit(self, sig: int, frame: Any) -> None:
                server.queue.close()
                super().handle_exit(sig, frame)

        config = uvicorn.Config(
            make_app(server, names=[*hosts, cfg.host]),
            log_level="warning",
            limit_concurrency=_MOST_CONNECTIONS,
            server_header=False,
        )
        port = listener.getsockname()[1]
        print(f"the page is at http://{_shown(cfg.host)}:{port}/ (Ctrl-C ends it)", flush=True)
        # uvicorn raises the signal that ended it again.
        with sigterm_as_ctrl_c(), suppress(KeyboardInterrupt):
            Quick(config).run(sockets=[listener])


def _follow_checkpoint(cfg: DictConfig) -> None:
    """Let `checkpoint` stand for its results: dVAE and CLIP are those beside it, unless they are named themselves.

    Raises: FileNotFoundError if it is not there; ValueError if it does not lie among results, or if what it stands for
        is given too.
    """
    if cfg.checkpoint is None:
        return
    for option in ("transformer", "results_dir"):
        if not OmegaConf.is_interpolation(cfg, option):
            raise ValueError(f"checkpoint says what {option} is, so leave out one of them, got {option}={cfg[option]}")
    path = Path(cfg.checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}'; correct checkpoint=")
    if path.absolute().parts[-3:-1] != ("transformer", "checkpoints"):
        raise ValueError(
            f"checkpoint must be a file RESULTS/transformer/checkpoints/*, got '{path}'; name others by transformer= "
            "and dvae="
        )
    cfg.transformer = str(path)
    cfg.results_dir = str(path.absolute().parents[2])


def _guidance_scale(cfg: DictConfig, pipeline: Pipeline) -> float:
    scale = pipeline.default_guidance_scale if cfg.guidance_scale is None else float(cfg.guidance_scale)
    # The page hides what its model has no use for, so nobody could change it there.
    pipeline.check_guidance(scale, cfg.negative_prompt)
    return scale


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; warns if they may come from other machines.

    Raises: OSError if there is no such address here or its port is taken; TypeError or ValueError for a bad port.
    """
    require_int("port", port, at_least=0)
    if port > 65535:
        raise ValueError(f"port must be at most 65535, got {port}")
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        hint = "choose another port=, or 0 for any that is free, or another host="
        raise OSError(f"cannot take connections at {host}:{port} ({error}); {hint}") from error
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        print(
            f"warning: the page has no password: whoever reaches {host}:{listener.getsockname()[1]} can use it",
            file=sys.stderr,
        )
    return listener


def _shown(host: str) -> str:
    """A host as it stands in an address bar."""
    return f"[{host}]" if ":" in host else host


def main() -> None:
    """Command line, with Hydra's options."""
    config_dir = Path("conf").absolute()
    if not (config_dir / "app.yaml").is_file():
        raise FileNotFoundError(f"no configuration in '{config_dir}'; run this in the directory of train.py")
    run_script(
        serve,
        config_dir=config_dir,
        config_name="app",
        text_options=("prompt", "negative_prompt"),
        path_options=("name", "results_dir", "checkpoint", "transformer", "dvae", "rerank.model"),
    )


if __name__ == "__main__":
    main()
