"""What the pages that open in a browser share: each is one HTML file with all in it, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

# Pictures up to this side have hard pixels where they are enlarged. WebP's halved colour resolution would show there,
# so they are kept exactly if that takes no more than a larger picture does: 1.5 kB for the demo's 60 x 60 pixels.
_SMALL_SIDE, _MOST_EXACT_BYTES = 128, 10_000
# At this 256 x 256 pixels take 8.6 kB of an emoji and 18 kB of a photograph with grain, a fifth to a quarter of what
# they take exactly; sampled pictures have no grain.
_QUALITY = 90


def render_page(template: str, **values: Any) -> str:
    """The page that a template of this package makes of `values`, which are escaped.

    The template has one style and one script element, and in its head a meta element with the variable
    `content_security_policy`, by which a browser loads nothing and runs no other script.
    """
    source = read_page(template)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # without Jinja's sorting of keys
    policy = f"{own_code_alone(source)}; img-src data:"
    return environment.from_string(source).render(content_security_policy=policy, **values)


def read_page(template: str) -> str:
    """The source of a page of this package, with what it includes by name: its style is whole, and has one hash."""

    def read(name: str) -> str:
        return resources.files("dalle1").joinpath(name).read_text(encoding="utf-8")

    page = re.sub(r'{% include "([\w.]+)" %}\n', lambda found: read(found[1]), read(template))
    assert "{% include" not in page, "an include is written as above, and what it names includes nothing"
    return page


def embed(picture: Image.Image) -> dict[str, Any]:
    """A picture as a WebP data URI, with its size."""
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


def own_code_alone(page: str) -> str:
    """A content security policy: nothing is loaded, and no script or style runs but the page's own, whatever is in it.

    What may be loaded nevertheless is for the caller to add.
    """

    def digest(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {digest('style')}; script-src {digest('script')}; "
        "base-uri 'none'; form-action 'none'"
    )


def for_json(value: Any) -> Any:
    """Plain types without what a browser cannot read: NaN and infinities are None, integers beyond 2^53 are text."""
    if isinstance(value, Mapping):
        return {str(key): for_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) > 2**53:
        return str(value)
    return value
