"""The page on which a run of sampling is looked at: one HTML file with the pictures in it, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from importlib import resources
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from PIL import Image

# Pictures up to this side have hard pixels where they are enlarged. WebP's halved colour resolution would show there,
# so they are kept exactly if that takes no more than a larger picture does: 1.5 kB for the demo's 60 x 60 pixels.
_SMALL_SIDE, _MOST_EXACT_BYTES = 128, 10_000
# At this 256 x 256 pixels take 8.6 kB of an emoji and 18 kB of a photograph with grain, a fifth to a quarter of what
# they take exactly; sampled pictures have no grain.
_QUALITY = 90
# Said by the prompt, or not part of what made the pictures.
_OPTION_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
# Above this pages take long to make and to open (10 ms and 28 kB for each picture of 256 x 256); the rest is files.
_MOST_PICTURES = 2000
_NOT_REPEATED = ("prompt", "prompts_file", "out", "rerank.only")


def render_gallery(manifest: Mapping[str, Any], open_picture: Callable[[str], Image.Image]) -> str:
    """A page with all pictures of a run, best first, and what made each; it works from disk, and moved away alone.

    Args:
        manifest: What the run's `manifest.json` holds, format 2.
        open_picture: Gives the picture of a file that the manifest names.
    """
    manifest = _for_json(manifest)
    prompts = [{"prompt": entry["prompt"], "sampled": entry["sampled"]} for entry in manifest["prompts"]]
    for entry in prompts:
        entry["command"] = sampling_command(entry["prompt"], manifest["settings"])
    most = max(1, _MOST_PICTURES // max(1, len(prompts)))  # of each prompt
    pictures = [
        {"prompt": number} | picture
        for number, entry in enumerate(manifest["prompts"][:_MOST_PICTURES])
        for picture in entry["pictures"][:most]
    ]
    kept = sum(len(entry["pictures"]) for entry in manifest["prompts"])
    # Stable: what has no score stays in the manifest's order, at the end.
    pictures.sort(key=lambda picture: math.inf if picture["score"] is None else -picture["score"])
    source = resources.files("dalle1").joinpath("gallery.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # without Jinja's sorting of keys
    run = {key: manifest[key] for key in ("created", "versions", "settings", "checkpoints", "reranker")}
    return environment.from_string(source).render(
        content_security_policy=_content_security_policy(source),
        title=prompts[0]["prompt"] if len(prompts) == 1 else f"{len(prompts)} prompts",
        created=f"{datetime.fromisoformat(manifest['created']):%Y-%m-%d %H:%M %Z}",
        complete=manifest["complete"],
        progress=_progress(manifest),
        left_out=kept - len(pictures),
        origin=_origin(open_picture) if manifest.get("has_image_prompt") else [],
        sampled=sum(entry["sampled"] for entry in prompts),
        prompts=prompts,
        cards=[picture | embed_picture(open_picture(picture["file"])) for picture in pictures],
        orders=_orders(has_scores=any(p["score"] is not None for p in pictures), has_prompts=len(prompts) > 1),
        data={
            "run": run,
            "prompts": prompts,
            "pictures": [picture | {"link": "./" + quote(picture["file"])} for picture in pictures],
        },
    )


def _origin(open_picture: Callable[[str], Image.Image]) -> list[tuple[dict[str, Any], str]]:
    """What pictures of an image prompt were sampled from, and its captions."""
    names = {"image.png": "sampled from this picture", "mask.png": "white was sampled again"}
    return [(embed_picture(open_picture(name)), caption) for name, caption in names.items()]


def sampling_command(prompt: str, settings: Mapping[str, Any]) -> str | None:
    """The shell command that samples a prompt with these settings again.

    None if an option holds a text that `sample.py` does not take literally: one in quotes, or `???`.
    """
    options = {"prompt": prompt} | {
        name: value
        for setting in settings.items()
        for name, value in _options(*setting)
        # A manifest may come from anywhere, and a command may be pasted into a shell: no flags.
        if value is not None and name not in _NOT_REPEATED and _OPTION_NAME.fullmatch(name)
    }
    if any(isinstance(value, str) and (value == "???" or value[:1] in ("'", '"')) for value in options.values()):
        return None
    return shlex.join(["python", "sample.py", *(f"{name}={_spell(value)}" for name, value in options.items())])


def _options(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A setting as options; `kind` is the choice of a group: {"kind": "clip", "model": m} is =clip and .model=m."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _options(name if key == "kind" else f"{name}.{key}", entry)
    else:
        yield name, value


def _spell(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_spell, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _progress(manifest: Mapping[str, Any]) -> str | None:
    """How far an incomplete run came, where its settings tell how far it was to go."""
    settings = manifest["settings"]
    candidates = settings.get("variations") or settings.get("candidates", 0)
    # A run that was interrupted may list only the prompts that it came to.
    n_prompts = len(manifest.get("origin", manifest)["prompts"])
    sampled, wanted = sum(entry["sampled"] for entry in manifest["prompts"]), candidates * n_prompts
    return f"{sampled:,} of {wanted:,} candidates" if sampled < wanted else None


def _orders(*, has_scores: bool, has_prompts: bool) -> list[tuple[str, str]]:
    """Name and label of the orders that make a difference; the first one is the page's at first."""
    best, prompt = ("best", "Best first"), ("prompt", "By prompt")
    return [best] * has_scores + [prompt] * has_prompts + [("candidate", "By candidate")]


def embed_picture(picture: Image.Image) -> dict[str, Any]:
    """A picture for a page: `uri` with WebP data, `width`, `height`, and `is_small` for hard pixels."""
    is_small = max(picture.size) <= _SMALL_SIDE
    content = _webp(picture, lossless=is_small)
    if is_small and len(content) > _MOST_EXACT_BYTES:
        content = _webp(picture, lossless=False)
    uri = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
    return {"uri": uri, "width": picture.width, "height": picture.height, "is_small": is_small}


def _webp(picture: Image.Image, *, lossless: bool) -> bytes:
    buffer = io.BytesIO()
    # Quality means effort where nothing is lost: the default is enough.
    quality = 80 if lossless else _QUALITY
    picture.convert("RGB").save(buffer, format="WEBP", lossless=lossless, quality=quality)
    return buffer.getvalue()


def _content_security_policy(source: str) -> str:
    """Nothing is loaded, and no script or style runs but the template's own, whatever a prompt says."""

    def digest(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {digest('style')}; script-src {digest('script')}; "
        "base-uri 'none'; form-action 'none'"
    )


def _for_json(value: Any) -> Any:
    """Plain types without what a browser cannot read: NaN and infinities are None, integers beyond 2^53 are text."""
    if isinstance(value, Mapping):
        return {str(key): _for_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) > 2**53:
        return str(value)
    return value
