"""OpenAI's released dVAE under our names: the sizes read off the weights, every key and shape checked.

The encoder and the decoder are two files. Their convolutions are named `<place>.w` and `<place>.b`, where ours are
`<place>.weight` and `<place>.bias`; the decoder's first one is our codebook.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.released.weights_file import Setting, Weights

ADVICE = "give the two files of one released dVAE"
_BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.")
_OUR_BLOCK = re.compile(r"(encoder|decoder)\.groups\.(\d+)\.(shortcut|convs\.(\d+))\.(weight|bias)")
_OUR_OTHERS = {
    "encoder.stem.weight": ("encoder", "blocks.input.w"),
    "encoder.stem.bias": ("encoder", "blocks.input.b"),
    "encoder.head.weight": ("encoder", "blocks.output.conv.w"),
    "encoder.head.bias": ("encoder", "blocks.output.conv.b"),
    "codebook": ("decoder", "blocks.input.w"),
    "codebook_bias": ("decoder", "blocks.input.b"),
    "decoder.head.weight": ("decoder", "blocks.output.conv.w"),
    "decoder.head.bias": ("decoder", "blocks.output.conv.b"),
}
Shape = tuple[int, ...]


def build_dvae(encoder: Weights, decoder: Weights) -> DVAE:
    """The dVAE whose parts two files hold, in fp32.

    Raises: ValueError in one sentence if they are not an encoder and a decoder that belong together, or a key, a
        shape, a setting or a value is not what such a dVAE has.
    """
    files = {"encoder": encoder, "decoder": decoder}
    config = read_config(encoder.tensors, decoder.tensors)
    with torch.device("meta"):
        model = DVAE(config)
    places = {name: official_name(name, config) for name in model.state_dict()}
    shapes = {places[name]: _official_shape(name, tensor.shape) for name, tensor in model.state_dict().items()}
    for side, weights in files.items():
        _check_shapes(side, weights.tensors, {key: shape for (owner, key), shape in shapes.items() if owner == side})
        _check_settings(side, weights.settings, config)
    state = {name: _to_ours(name, side, key, files[side].tensors[key]) for name, (side, key) in places.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_config(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> DVAEConfig:
    """The sizes that an encoder's and a decoder's weights have in common.

    Raises: ValueError if they are not an encoder and a decoder, or do not belong together.
    """
    files = {"encoder": encoder, "decoder": decoder}
    inputs = {side: _conv_shape(side, tensors, "blocks.input.w") for side, tensors in files.items()}
    outputs = {side: _conv_shape(side, tensors, "blocks.output.conv.w") for side, tensors in files.items()}
    # The encoder begins with 7x7 pixels, the decoder with single codes.
    kinds = {side: "a decoder" if shape[2:] == (1, 1) else "an encoder" for side, shape in inputs.items()}
    if kinds != {"encoder": "an encoder", "decoder": "a decoder"}:
        raise ValueError(
            f"the encoder's file must hold an encoder and the decoder's a decoder, got {kinds['encoder']} and "
            f"{kinds['decoder']}; {ADVICE}, each as its own option"
        )
    blocks = {side: [match for key in tensors if (match := _BLOCK.match(key))] for side, tensors in files.items()}
    for side, matches in blocks.items():
        if not matches:
            raise ValueError(f"the {side}'s file must hold 'blocks.group_1.block_1...', which is missing; {ADVICE}")
    # Counted, not the highest number, so that no key can ask for more than the file holds.
    sizes = {
        "vocab_size": {"encoder": outputs["encoder"][0], "decoder": inputs["decoder"][1]},
        "n_hid": {"encoder": inputs["encoder"][0], "decoder": outputs["decoder"][1]},
        "n_groups": {side: len({match[1] for match in matches}) for side, matches in blocks.items()},
        "n_blocks_per_group": {side: len({match[2] for match in matches}) for side, matches in blocks.items()},
    }
    for name, values in sizes.items():
        if values["encoder"] != values["decoder"]:
            raise ValueError(
                f"the encoder and the decoder must have the same {name}, got {values['encoder']} and "
                f"{values['decoder']}; {ADVICE}"
            )
    config = DVAEConfig(**{name: values["encoder"] for name, values in sizes.items()}, n_init=inputs["decoder"][0])
    # Before a model is built of that size: each group doubles it.
    wanted = (config.vocab_size, config.feature_width, 1, 1)
    if outputs["encoder"] != wanted:
        raise _misshapen("encoder", "blocks.output.conv.w", wanted, outputs["encoder"])
    return config


def official_name(name: str, config: DVAEConfig) -> tuple[str, str]:
    """The file ("encoder" or "decoder") and the key there of one of our weights."""
    if name in _OUR_OTHERS:
        return _OUR_OTHERS[name]
    match = _OUR_BLOCK.fullmatch(name)
    assert match, f"{name} has no place in the released files"
    side, number, place, conv, kind = match.groups()
    # Behind the blocks of each group stands its change of resolution.
    group, block = divmod(int(number), config.n_blocks_per_group + 1)
    part = "id_path" if place == "shortcut" else f"res_path.conv_{int(conv) + 1}"
    return side, f"blocks.group_{group + 1}.block_{block + 1}.{part}.{'w' if kind == 'weight' else 'b'}"


def _official_shape(name: str, shape: Shape) -> Shape:
    return (shape[1], shape[0], 1, 1) if name == "codebook" else tuple(shape)


def _to_ours(name: str, side: str, key: str, tensor: Tensor) -> Tensor:
    """One weight in fp32, as our model has it."""
    if not tensor.is_floating_point():
        raise ValueError(f"the {side}'s {key!r} must be floating-point numbers, got {tensor.dtype}; {ADVICE}")
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"the {side}'s {key!r} must be finite, it holds NaN or infinity; get the file again")
    return (tensor[:, :, 0, 0].T if name == "codebook" else tensor).contiguous()


def _conv_shape(side: str, tensors: Mapping[str, Tensor], key: str) -> Shape:
    if key not in tensors:
        raise ValueError(f"the {side}'s file must hold {key!r}, which is missing among its {len(tensors)}; {ADVICE}")
    shape = tuple(tensors[key].shape)
    if len(shape) != 4:
        raise _misshapen(side, key, ("out", "in", "height", "width"), shape)
    return shape


def _check_shapes(side: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape]) -> None:
    for key, shape in wanted.items():
        if key not in tensors:
            raise ValueError(
                f"the {side}'s file must hold {key!r} of shape {shape}, which is missing among its {len(tensors)}; "
                f"{ADVICE}"
            )
        if tuple(tensors[key].shape) != shape:
            raise _misshapen(side, key, shape, tuple(tensors[key].shape))
    unexpected = [key for key in tensors if key not in wanted]
    if unexpected:
        raise ValueError(
            f"the {side}'s file must hold {len(wanted)} weights, it also holds {unexpected[0][:100]!r} of shape "
            f"{tuple(tensors[unexpected[0]].shape)}; {ADVICE}"
        )


def _misshapen(side: str, key: str, wanted: tuple[object, ...], got: Shape) -> ValueError:
    return ValueError(f"the {side}'s {key!r} must have the shape {_text(wanted)}, got {_text(got)}; {ADVICE}")


def _text(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _check_settings(side: str, settings: Mapping[str, Setting], config: DVAEConfig) -> None:
    """Refuse modules that would compute something else with the same weights."""
    wanted: dict[str, Setting] = {
        "post_gain": config.residual_gain,
        "kernel_size": 2,  # of pooling, as is the next
        "stride": 2,
        "scale_factor": 2,
        "mode": "nearest",
    }
    for name, value in settings.items():
        needed = wanted.get(name.rpartition(".")[2], value)
        same = value == needed
        if isinstance(value, float) and isinstance(needed, float):
            same = math.isclose(value, needed, rel_tol=1e-6)
        if not same:
            got = repr(value)[:100]
            raise ValueError(
                f"the {side}'s {name[:100]!r} must be {needed}, as in the released dVAE, got {got}; {ADVICE}"
            )
