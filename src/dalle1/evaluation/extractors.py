"""Networks that turn pictures into features, by name: Inception files, our CLIP, CLIP, SigLIP and DINOv2 of others.

| specification | network | features |
|---|---|---|
| `inception:FILE` | a TorchScript file with the interface of inception-2015-12-05.pt | 2048 pooled, and classes |
| `inception:hf://OWNER/REPO/FILE` | the same, from the Hugging Face hub | |
| `clip:CHECKPOINT` | our CLIP's image tower | projected, not normalised; reads captions too |
| `hf:NAME_OR_DIR` | a CLIP or SigLIP of transformers | projected, not normalised; reads captions too |
| | a DINOv2 of transformers | the normalised state of the class token |

What a TorchScript file must be: `forward(uint8 (n, 3, h, w), return_features=True)` gives features (n, d), without
`return_features` class probabilities or logits (n, c); an argument `no_output_bias` is set, as the inception score was
first computed without that bias. Such a file is a program, in a language of its own that has no access to Python: no
pickle in it is run, but it can compute for as long as it likes and read files that its operators can name. Take it from
where you would take a program from.

A file that resizes pictures by itself, as inception-2015-12-05.pt does (with TensorFlow's alignment and no antialias),
gets them as they are, so its FIDs are those of StyleGAN's tools. To another they come as 299 x 299 pixels, whatever
their aspect, resized bilinearly with antialias and rounded to 8 bits, as Pillow does it. Which it is, is tried at
loading. CLIP, SigLIP and DINOv2 are shown what their own preprocessing makes of a picture.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle1.checkpoint import Loaded, load_clip, text_tokenizer_of
from dalle1.data.transforms import to_unit_interval
from dalle1.models.clip import CLIP
from dalle1.rerank.hf_clip import HFCLIPReranker
from dalle1.rerank.hf_files import (
    HUB_ID,
    RANKING,
    Use,
    check_files,
    find_model,
    hash_weights,
    load_network,
    quiet_transformers,
    read_model_type,
    short_reason,
)
from dalle1.rerank.hf_preprocessing import Preprocessing, read_preprocessing

INCEPTION_SIDE = 299  # pixels
# Height and width of the picture on which a file shows that it resizes: far below what its convolutions could do with.
_SMALL_PICTURE = (24, 16)
_COLOR = (200, 90, 30)
_SAME = 0.01  # relative difference of two features that are taken for equal; fp16 and resizing make far less
_HUB_PREFIX = "hf://"
_HASH_DIGITS = 8  # of a content's hash, in names
_TEXTS_AT_ONCE = 64
_EXTRACTION = Use(
    classes={**RANKING.classes, "dinov2": "Dinov2Model"},
    kinds="a CLIP, SigLIP or DINOv2 (model_type clip, siglip or dinov2)",
    needs_tokenizer=False,
    allow_download="give --allow_download",
    otherwise="take another extractor",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Of n pictures, float32 on the CPU."""

    features: Float[Tensor, "n d"]
    probabilities: Float[Tensor, "n c"] | None  # of classes, if the extractor has such


class Extractor(Protocol):
    """A network that gives features of pictures."""

    @property
    def name(self) -> str:
        """Kind and eight digits of a hash of its content: numbers of equal names may be compared."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What identifies it, in plain types."""

    @property
    def n_features(self) -> int:
        """Of each picture."""

    @property
    def has_classes(self) -> bool:
        """Whether it gives class probabilities too."""

    @property
    def reads_text(self) -> bool:
        """Whether `text_features` works."""

    def to(self, device: torch.device) -> None:
        """Move the network."""

    def __call__(self, pictures: Sequence[Tensor]) -> Features:
        """Features of pictures, each uint8 (3, h, w), together."""

    def text_features(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """Features of length 1 of captions, float32 on the CPU, comparable with those of pictures.

        Raises: ValueError for a caption that is too long.
        """


class InceptionExtractor:
    """A TorchScript file with Inception's interface, see the module's docstring."""

    reads_text = False

    def __init__(self, network: torch.jit.ScriptModule, *, path: str, sha256: str, classes: bool = True) -> None:
        """Try the network on some pictures; without `classes` it gives features alone, in half the time.

        Raises: ValueError if it has another interface.
        """
        self._network = network.eval()
        self._device = torch.device("cpu")
        self._prepare = Preprocessing(resize=(INCEPTION_SIDE, INCEPTION_SIDE), mode="bilinear", crop=None, scale=1.0)
        levels = torch.arange(2 * 3 * INCEPTION_SIDE**2) % 251
        probe = levels.to(torch.uint8).view(2, 3, INCEPTION_SIDE, INCEPTION_SIDE)
        try:
            forward: Any = network.forward  # a method of the file, not of the class
            names = {argument.name for argument in forward.schema.arguments}
            self._of_classes = {"no_output_bias": True} if "no_output_bias" in names else {}
            features, scores = self._features(probe), self._classes(probe)
            if features.shape[:1] != (2,) or features.ndim != 2 or scores.ndim != 2 or len(scores) != 2:
                raise ValueError(f"it gave shapes {tuple(features.shape)} and {tuple(scores.shape)}")
            if not bool(features.isfinite().all() and scores.isfinite().all()):
                raise ValueError("it gave numbers that are not finite")
        except Exception as error:  # a program of others can raise anything
            raise ValueError(
                f"'{path}' must be called as forward(uint8 pictures, return_features=True) and give a tensor "
                f"(pictures, features), and of classes without it ({short_reason(error)}); take a file with the "
                "interface of inception-2015-12-05.pt"
            ) from error
        self.n_features = features.shape[1]
        self.has_classes = classes
        sums = scores.sum(1)
        self._are_logits = bool((scores < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
        self._resizes = self._takes_any_size()
        # Features of the two ways never have one name, even of one file.
        self.name = f"inception-{'unresized-' if self._resizes else ''}{sha256[:_HASH_DIGITS]}"
        self.facts = {
            "kind": "inception",
            "file": path,
            "sha256": sha256,
            "without_output_bias": bool(self._of_classes),
            "resized_by": "the file itself" if self._resizes else "bilinear with antialias, before it",
        }

    def _takes_any_size(self) -> bool:
        """Whether the network itself brings pictures to the size that it looks at.

        A small one must be no error, and in one of a single color it must see what it sees in a large one: convolutions
        alone would see more of the border.
        """
        color = torch.tensor(_COLOR, dtype=torch.uint8).view(1, 3, 1, 1)
        try:
            small = self._features(color.expand(1, 3, *_SMALL_PICTURE).contiguous())
        except Exception:  # a program of others says in any way that it takes no such picture
            return False
        large = self._features(color.expand(1, 3, INCEPTION_SIDE, INCEPTION_SIDE).contiguous())
        return small.shape == large.shape and bool((small - large).float().norm() <= _SAME * large.float().norm())

    @classmethod
    def load(cls, path: str | Path, *, classes: bool = True) -> InceptionExtractor:
        """The network in a file; `classes` as `__init__` takes it.

        Raises: FileNotFoundError if there is none; ValueError if it is no TorchScript file, or as `__init__` does.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no Inception file at '{path}'; correct the path")
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        try:
            with warnings.catch_warnings():
                # PyTorch wants other formats to be written; this is the one in which the known file is.
                warnings.simplefilter("ignore", DeprecationWarning)
                network = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        except Exception as error:  # damaged files make the reader raise anything
            reason = short_reason(error)
            raise ValueError(f"'{path}' must be a TorchScript file, it cannot be read as one ({reason})") from error
        return cls(network, path=str(path), sha256=sha256, classes=classes)

    def to(self, device: torch.device) -> None:
        """Move the network."""
        self._network.to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Tensor]) -> Features:
        """See `Extractor`."""
        if self._resizes:
            groups = [group.to(self._device) for group in of_one_size(pictures)]
        else:
            groups = [_prepared(pictures, lambda images: self._prepare(images).to(torch.uint8), self._device)]
        features = torch.cat([self._features(pixels) for pixels in groups]).float().cpu()
        if not self.has_classes:
            return Features(features=features, probabilities=None)
        scores = torch.cat([self._classes(pixels) for pixels in groups]).float()
        return Features(features=features, probabilities=(scores.softmax(1) if self._are_logits else scores).cpu())

    def _features(self, pixels: Tensor) -> Tensor:
        # Optimised programs change after the first calls, and with them last digits.
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._network(pixels, return_features=True)

    def _classes(self, pixels: Tensor) -> Tensor:
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._network(pixels, **self._of_classes)

    def text_features(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """See `Extractor`; it has none."""
        raise TypeError(f"{self.name} reads no captions")


class CLIPExtractor:
    """Our CLIP: the image tower's projected feature before it is brought to length 1."""

    has_classes, reads_text = False, True

    def __init__(self, clip: Loaded[CLIP]) -> None:
        """Extract with a loaded CLIP. Raises: ValueError if its checkpoint has no text tokenizer."""
        self._clip = clip.model
        self._tokenizer = text_tokenizer_of(clip, "CLIP")
        self.name = f"clip-{clip.sha256[:_HASH_DIGITS]}"
        self.facts = {"kind": "clip", "sha256": clip.sha256, "step": clip.step}
        self.n_features = clip.model.config.embed_dim

    def to(self, device: torch.device) -> None:
        """Move the CLIP."""
        self._clip.to(device)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Tensor]) -> Features:
        """See `Extractor`."""
        images = _prepared(pictures, self._fit, self._clip.log_scale.device)
        return Features(features=self._clip.image_tower(images).float().cpu(), probabilities=None)

    def _fit(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 s s"]:
        """As the tower does it itself, so that pictures of different sizes can be encoded together."""
        side = self._clip.config.image_size
        if images.shape[-2:] == (side, side):
            return images
        return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """See `Extractor`."""
        tokens = self._tokenizer.encode(captions).to(self._clip.log_scale.device)
        return torch.cat([self._clip.encode_text(part) for part in torch.split(tokens, _TEXTS_AT_ONCE)]).float().cpu()


class HFCLIPExtractor:
    """A CLIP or SigLIP of transformers: the projected feature before it is brought to length 1."""

    has_classes, reads_text = False, True

    def __init__(self, model: HFCLIPReranker) -> None:
        """Extract with a loaded model."""
        self._model = model
        self._device = torch.device("cpu")
        self.facts = model.facts
        self.name = _hf_name(f"hf-{self.facts['model_type']}", self.facts, model.preprocessing)
        self.n_features = model.n_features

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self._model.to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Tensor]) -> Features:
        """See `Extractor`."""
        # The model's preprocessing also says how pictures of different sizes come to one.
        pixels = _prepared(pictures, self._model.prepare, self._device)
        return Features(features=self._model.pixel_features(pixels).float().cpu(), probabilities=None)

    def text_features(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """See `Extractor`."""
        return self._model.text_features(captions).float().cpu()


class DINOExtractor:
    """A DINOv2 of transformers: the class token's state after the last normalisation, as the library pools it."""

    has_classes, reads_text = False, False

    def __init__(self, network: Any, preprocessing: Preprocessing, facts: Mapping[str, Any]) -> None:
        """Use `load_extractor`."""
        self._network = network
        self._prepare = preprocessing
        self.facts = dict(facts)
        self.name = _hf_name("hf-dinov2", facts, preprocessing)
        self.n_features = int(network.config.hidden_size)

    def to(self, device: torch.device) -> None:
        """Move the network."""
        self._network.to(device)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Tensor]) -> Features:
        """See `Extractor`."""
        pixels = _prepared(pictures, self._prepare, self._network.device)
        return Features(features=self._network(pixel_values=pixels).pooler_output.float().cpu(), probabilities=None)

    def text_features(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """See `Extractor`; it has none."""
        raise TypeError(f"{self.name} reads no captions")


def load_extractor(specification: str, *, allow_download: bool = False, classes: bool = True) -> Extractor:
    """The extractor of a specification (see the module's docstring), on the CPU.

    Args:
        specification: Kind and place.
        allow_download: Whether a file or model that is not on this machine may be fetched from the hub.
        classes: Whether class probabilities are wanted of extractors that can give them.

    Raises: ValueError for another kind; OSError if it is not there; ValueError if it is damaged or something else.
    """
    kind, _, place = specification.partition(":")
    if kind not in ("inception", "clip", "hf") or not place:
        raise ValueError(
            f"an extractor must be inception:FILE, clip:CHECKPOINT or hf:NAME_OR_DIRECTORY, got {specification!r}"
        )
    if kind == "clip":
        return CLIPExtractor(load_clip(place))
    if kind == "hf":
        return _load_hf(place, allow_download)
    if place.startswith(_HUB_PREFIX):
        place = _find_on_hub(place.removeprefix(_HUB_PREFIX), allow_download)
    return InceptionExtractor.load(place, classes=classes)


def _load_hf(name: str, allow_download: bool) -> Extractor:
    with quiet_transformers():
        directory, revision = find_model(name, allow_download=allow_download, use=_EXTRACTION)
        model_type = read_model_type(directory, name, _EXTRACTION)
        if model_type in RANKING.classes:
            use = replace(_EXTRACTION, needs_tokenizer=True)
            return HFCLIPExtractor(HFCLIPReranker.load(name, allow_download=allow_download, use=use))
        check_files(directory, name, is_local=revision is None, use=_EXTRACTION)
        preprocessing = read_preprocessing(directory, model_type)
        network = load_network(directory, _EXTRACTION.classes[model_type], name)
    facts = {"kind": "hf", "model": name, "model_type": model_type, "weights_sha256": hash_weights(directory)}
    return DINOExtractor(network, preprocessing, facts | ({} if revision is None else {"revision": revision}))


def _find_on_hub(place: str, allow_download: bool) -> str:
    """The path of OWNER/REPO/FILE in the hub's local cache. Raises: OSError if it is not there."""
    owner, _, rest = place.partition("/")
    repository, _, file = rest.partition("/")
    if not file or not HUB_ID.fullmatch(f"{owner}/{repository}"):
        raise FileNotFoundError(f"a file on the hub must be {_HUB_PREFIX}OWNER/REPO/FILE, got '{_HUB_PREFIX}{place}'")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            "files of the hub need huggingface_hub, which is not installed; pip install '.[hf]'"
        ) from error
    repo_id = f"{owner}/{repository}"
    try:
        return str(huggingface_hub.hf_hub_download(repo_id, file, local_files_only=True))
    except OSError as error:
        if not allow_download:
            raise FileNotFoundError(
                f"'{_HUB_PREFIX}{place}' is not in the local cache of the Hugging Face hub; give "
                "--allow_download to download it, or give a file"
            ) from error
    try:
        return str(huggingface_hub.hf_hub_download(repo_id, file))
    except Exception as error:  # of the client, or of any of the two libraries for HTTP under it
        raise OSError(
            f"'{_HUB_PREFIX}{place}' could not be downloaded from the Hugging Face hub ({short_reason(error)}); check "
            "its name and the network, or give a file"
        ) from error


def _hf_name(kind: str, facts: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    """Other preprocessing makes other features of the same weights."""
    content = f"{facts['weights_sha256']}|{preprocessing}"
    return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:_HASH_DIGITS]}"


def _prepared(
    pictures: Sequence[Tensor], prepare: Callable[[Tensor], Tensor], device: torch.device
) -> Float[Tensor, "n 3 s s"]:
    """What a network sees of uint8 pictures, which `prepare` makes of those in [0, 1]."""
    if len({picture.shape for picture in pictures}) == 1:
        return prepare(to_unit_interval(torch.stack(list(pictures)).to(device)))
    return torch.cat([prepare(to_unit_interval(picture[None].to(device))) for picture in pictures])


def of_one_size(pictures: Sequence[Tensor]) -> list[Tensor]:
    """uint8 (b, 3, h, w) each: consecutive pictures of one size."""
    groups: list[list[Tensor]] = []
    for picture in pictures:
        if groups and groups[-1][0].shape == picture.shape:
            groups[-1].append(picture)
        else:
            groups.append([picture])
    return [torch.stack(group) for group in groups]
