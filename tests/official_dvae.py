"""Files of the same form as OpenAI's released dVAE, and what they compute, written without dalle1.

The classes have the released ones' names, attributes and layers. They are importable only while they are saved, as
they are not on the machine that converts. The reference uses nothing but torch.nn.functional on the raw `.w`, `.b`.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

FORMS = ("zip", "legacy", "state_dict", "legacy_state_dict", "safetensors")


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kw: int, use_float16: bool = True, **common: Any) -> None:
        super().__init__()
        self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, use_float16
        self.device, self.requires_grad = common["device"], common["requires_grad"]
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / math.sqrt(n_in * kw**2))
        self.b = nn.Parameter(0.1 * torch.randn(n_out))


class _Block(nn.Module):
    kernels: tuple[int, ...]

    def __init__(self, n_in: int, n_out: int, n_layers: int, device: torch.device, requires_grad: bool) -> None:
        super().__init__()
        self.n_in, self.n_out, self.n_layers, self.device, self.requires_grad = (
            *(n_in, n_out, n_layers),
            *(device, requires_grad),
        )
        self.n_hid = n_out // 4
        self.post_gain = 1 / n_layers**2
        make_conv = partial(Conv2d, device=device, requires_grad=requires_grad)
        self.id_path = make_conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in, self.n_hid, self.n_hid, self.n_hid, n_out]
        layers: list[tuple[str, nn.Module]] = []
        for i, kernel in enumerate(self.kernels):
            layers += [(f"relu_{i + 1}", nn.ReLU()), (f"conv_{i + 1}", make_conv(widths[i], widths[i + 1], kernel))]
        self.res_path = nn.Sequential(OrderedDict(layers))


class EncoderBlock(_Block):
    kernels = (3, 3, 3, 1)


class DecoderBlock(_Block):
    kernels = (1, 3, 3, 3)


@dataclass(frozen=True)
class Sizes:
    vocab: int = 32
    n_hid: int = 8
    n_init: int = 12
    groups: int = 3
    blocks: int = 2


class _Half(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.group_count, self.n_hid, self.n_blk_per_group = sizes.groups, sizes.n_hid, sizes.blocks
        self.vocab_size = sizes.vocab
        self.device, self.requires_grad, self.use_mixed_precision = torch.device("cpu"), False, True
        self.make_conv = partial(Conv2d, device=self.device, requires_grad=False)

    def _groups(
        self, block: type[_Block], widths: list[int], change: str, make_change: Callable[[], nn.Module]
    ) -> list[Any]:
        common = {"n_layers": self.group_count * self.n_blk_per_group, "device": self.device, "requires_grad": False}
        groups = []
        for group in range(self.group_count):
            layers: list[tuple[str, nn.Module]] = [
                (f"block_{i + 1}", block(widths[group + (i > 0)], widths[group + 1], **common))
                for i in range(self.n_blk_per_group)
            ]
            layers += [(change, make_change())] if group < self.group_count - 1 else []
            groups.append((f"group_{group + 1}", nn.Sequential(OrderedDict(layers))))
        return groups

    def _stack(self, first: nn.Module, groups: list[Any], last: nn.Module) -> nn.Sequential:
        output = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", last)]))
        return nn.Sequential(OrderedDict([("input", first), *groups, ("output", output)]))


class Encoder(_Half):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.input_channels = 3
        widths = [sizes.n_hid] + [sizes.n_hid * 2**group for group in range(sizes.groups)]
        self.blocks = self._stack(
            self.make_conv(3, widths[0], 7),
            self._groups(EncoderBlock, widths, "pool", lambda: nn.MaxPool2d(kernel_size=2)),
            self.make_conv(widths[-1], sizes.vocab, 1, use_float16=False),
        )


class Decoder(_Half):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.n_init, self.output_channels = sizes.n_init, 3
        widths = [sizes.n_init] + [sizes.n_hid * 2**group for group in reversed(range(sizes.groups))]
        self.blocks = self._stack(
            self.make_conv(sizes.vocab, sizes.n_init, 1, use_float16=False),
            self._groups(DecoderBlock, widths, "upsample", lambda: nn.Upsample(scale_factor=2, mode="nearest")),
            self.make_conv(widths[-1], 6, 1),
        )


@contextmanager
def _importable() -> Iterator[None]:
    """Let pickle find the classes under the released names."""
    places = {"utils": [Conv2d], "encoder": [Encoder, EncoderBlock], "decoder": [Decoder, DecoderBlock]}
    modules = {"dall_e": ModuleType("dall_e")}
    for place, classes in places.items():
        module = modules[f"dall_e.{place}"] = ModuleType(f"dall_e.{place}")
        module.__file__ = __file__  # the legacy format saves the source of classes
        for each in classes:
            setattr(module, each.__name__, each)
            each.__module__ = module.__name__
    sys.modules |= modules
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def make_official(sizes: Sizes = Sizes(), *, seed: int = 0) -> tuple[Encoder, Decoder]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder(sizes), Decoder(sizes)


def save_official(part: nn.Module, path: Path, form: str = "zip") -> Path:
    """Save an encoder or a decoder in one of FORMS."""
    if form == "safetensors":
        save_file(part.state_dict(), path)
    else:
        content = part.state_dict() if form.endswith("state_dict") else part
        with _importable():
            torch.save(content, path, _use_new_zipfile_serialization=not form.startswith("legacy"))
    return path


def reference_logits(encoder: nn.Module, image: Tensor) -> Tensor:
    """Logits over the codes (b, vocab, gh, gw) of pictures in [0, 1]."""
    return _run(dict(encoder.state_dict()), 0.8 * image + 0.1, lambda x: F.max_pool2d(x, kernel_size=2))


def reference_pictures(decoder: nn.Module, image_tokens: Tensor) -> Tensor:
    """Pictures in [0, 1] of tokens (b, gh, gw)."""
    weights = dict(decoder.state_dict())
    codes = F.one_hot(image_tokens, weights["blocks.input.w"].shape[1]).permute(0, 3, 1, 2).float()
    parameters = _run(weights, codes, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
    return ((torch.sigmoid(parameters[:, :3]) - 0.1) / 0.8).clamp(0, 1)


def _run(weights: dict[str, Tensor], x: Tensor, change: Any) -> Tensor:
    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.w"]
        return F.conv2d(x, weight, weights[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    names = [name.split(".") for name in weights if name.startswith("blocks.group_")]
    groups = len({name[1] for name in names})
    blocks = len({name[2] for name in names})
    x = conv(x, "blocks.input")
    for group in range(1, groups + 1):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            branch = x
            for i in range(1, 5):
                branch = conv(F.relu(branch), f"{name}.res_path.conv_{i}")
            shortcut = conv(x, f"{name}.id_path") if f"{name}.id_path.w" in weights else x
            x = shortcut + branch / (groups * blocks) ** 2
        if group < groups:
            x = change(x)
    return conv(F.relu(x), "blocks.output.conv")
