"""Which captioned pictures to train on, and how they are read: all that `data.` in the configuration may say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dalle1.data.augmentation import Augmentation
from dalle1.data.captions import CaptionSource
from dalle1.data.dataset import OnBadSample
from dalle1.data.fields import require_bool, require_int
from dalle1.data.filters import FilterConfig
from dalle1.data.preparation import SmallPictures
from dalle1.data.shapes_shards import ShapesRecipe
from dalle1.data.sources import Source, SourceSetting, Split, parse_sources, without_secrets
from dalle1.data.transforms import parse_color

Backend = Literal["auto", "indexed", "stream"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which captioned pictures to train on, and how they are read."""

    image_size: int  # side of the square pictures that models see, in pixels, >= 1
    batch_size: int  # samples per device, >= 1
    # Shards, folders or tables: a path, glob or address, or a list of them, with weights if wanted (`sources`). Needed
    # unless there are tokens.
    train: SourceSetting | None = None
    val: SourceSetting | None = None  # the same for validation, without weights
    tokens: str | None = None  # a directory that stage=tokens has written, instead of pictures
    # `indexed`: any sample at any time, exact; `stream`: shards from beginning to end (see `stream`). `auto` streams
    # what is not on this machine.
    backend: Backend = "auto"
    num_workers: int = 2  # processes per device that decode pictures; 0 decodes in the training process
    seed: int = 0  # decides the order of the samples, their augmentation and their captions' dropout, >= 0
    shuffle_window: int = 1 << 20  # samples that are shuffled together (`order.SampleOrder`), >= 1
    stream_buffer: int = 1000  # of a stream: samples that wait for their turn in each worker, >= 1
    allow_pipe: bool = False  # run the commands that shards called `pipe:...` name
    on_bad_sample: OnBadSample = "error"  # `skip` takes another sample instead, and logs it
    max_bad_fraction: float = 0.1  # with `skip`: a larger share of bad samples among those read stops the run; [0, 1]
    # Keep decoded pictures in memory (per worker): for small sets with num_workers=0, without augmentation.
    cache_images: bool = False
    recipe: ShapesRecipe | None = None  # makes the shards if they are missing
    caption: str = "text"  # where captions stand, see `captions.CaptionSource`
    filters: FilterConfig = field(default_factory=FilterConfig)  # which samples are left out
    # How training pictures become square: the centre, or as the paper does for that stage. Validation has the centre.
    augmentation: Augmentation = "none"
    background: str = "white"  # what transparent parts of pictures show: a colour's name or '#rrggbb'
    small_pictures: SmallPictures = "enlarge"  # those with a side below image_size; `refuse` makes them bad samples

    def __post_init__(self) -> None:
        """Refuse fields of a wrong type (TypeError) or outside their range (ValueError)."""
        minimums = {"image_size": 1, "batch_size": 1, "num_workers": 0, "seed": 0}
        for name, minimum in (minimums | {"shuffle_window": 1, "stream_buffer": 1}).items():
            require_int(name, getattr(self, name), at_least=minimum)
        for name in ("cache_images", "allow_pipe"):
            require_bool(name, getattr(self, name))
        choices = {"on_bad_sample": OnBadSample, "augmentation": Augmentation, "small_pictures": SmallPictures}
        for name, allowed in (choices | {"backend": Backend}).items():
            if getattr(self, name) not in get_args(allowed):
                *first, last = map(repr, get_args(allowed))
                raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {getattr(self, name)!r}")
        for name, read in (("background", parse_color), ("caption", lambda text: CaptionSource(setting=text))):
            try:
                read(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        share = self.max_bad_fraction
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise TypeError(f"max_bad_fraction must be a number in [0, 1], got {share!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {share!r}")
        if self.tokens is not None and not isinstance(self.tokens, str):
            raise TypeError(f"tokens must be a directory or null, got {self.tokens!r}")
        if self.recipe is not None and not isinstance(self.recipe, ShapesRecipe):
            raise TypeError(f"recipe must be a ShapesRecipe or null, got {self.recipe!r}")
        if not isinstance(self.filters, FilterConfig):
            raise TypeError(f"filters must be a FilterConfig, got {self.filters!r}")
        if self.cache_images and self.augmentation != "none":
            raise ValueError(
                "cache_images must be false with augmentation, which makes other pixels each time, got true with "
                f"augmentation={self.augmentation}; set one of them"
            )

    def sources(self, split: Split) -> list[Source]:
        """The places that a split comes from.

        Raises: ValueError if none is given, or validation has weights; as `sources.parse_sources`.
        """
        setting = getattr(self, split)
        if setting is None:
            raise ValueError(f"data.{split} must be given, as data.{split}=...")
        found = parse_sources(setting, f"data.{split}")
        if split == "val" and any(source.weight != 1 for source in found):
            raise ValueError("data.val must have no weights: every sample is shown once; leave them out")
        return found

    @property
    def source_names(self) -> list[list[Any]]:
        """Names of what is trained on, each with its weight: without directories, as shards may be copied elsewhere."""
        if self.tokens is not None:
            return [["tokens", 1.0]]
        sources = self.sources("train")
        return [[Path(without_secrets(path)).name, source.weight] for source in sources for path in source.paths]

    def is_stream(self, split: Split) -> bool:
        """Whether a split is read from beginning to end.

        Raises: ValueError for places that the chosen backend cannot read.
        """
        if self.tokens is not None:
            if self.backend == "stream":
                raise ValueError("data.tokens are always indexed, got data.backend=stream; leave it out")
            return False
        remote = [path for source in self.sources(split) if source.is_remote for path in source.paths]
        if self.backend == "indexed" and remote:
            raise ValueError(f"data.backend=indexed must have local shards, got {remote[0]!r}; use data.backend=stream")
        is_stream = self.backend == "stream" or bool(remote)
        if is_stream and self.cache_images:
            raise ValueError("data.cache_images must be false for a stream, got true; set data.cache_images=false")
        if is_stream and self.filters.near_duplicates is not None:
            raise ValueError(
                "filters.near_duplicates must be null for a stream, which does not know what came before on other "
                f"devices, got {self.filters.near_duplicates}; copy the shards here, or set it to null"
            )
        return is_stream
