"""Checkpoints that rebuild their model, and all the files that must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle1 import checkpoint as checkpoint_module
from dalle1.checkpoint import (
    DamagedCheckpointError,
    Loaded,
    check_pair,
    load_clip,
    load_dvae,
    load_image_tokenizer,
    load_transformer,
    make_record,
    read_checkpoint,
    weights_sha256,
    write_exported,
)
from dalle1.models.clip import CLIP
from dalle1.models.dvae import DVAE
from dalle1.models.transformer import DalleTransformer
from dalle1.tokenizers.text import TextTokenizer

Write = Callable[..., Path]


def test_loaded_dvae_gives_identical_output(make_dvae: Callable[..., DVAE], checkpoints: dict[str, Path]) -> None:
    model, loaded = make_dvae(), load_dvae(checkpoints["dvae"])
    image = torch.rand(2, 3, 12, 16)
    assert torch.equal(loaded.model.logits(image), model.logits(image))
    assert loaded.model.config == model.config
    assert loaded.step == 7


def test_loaded_transformer_gives_identical_output_and_has_its_tokenizer(
    make_transformer: Callable[..., DalleTransformer], checkpoints: dict[str, Path], text_tokenizer: TextTokenizer
) -> None:
    model, loaded = make_transformer(), load_transformer(checkpoints["transformer"])
    assert loaded.text_tokenizer is not None
    text = loaded.text_tokenizer.encode(["a red circle"])
    assert torch.equal(text, text_tokenizer.encode(["a red circle"]))
    image = torch.zeros(1, model.config.image_seq_len, dtype=torch.int64)
    for expected, actual in zip(model(text, image), loaded.model(text, image), strict=True):
        assert torch.equal(actual, expected)


def test_loaded_clip_gives_identical_output(make_clip: Callable[..., CLIP], checkpoints: dict[str, Path]) -> None:
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_clip(checkpoints["clip"]).model.encode_image(image), make_clip().encode_image(image))


def test_loaded_model_is_frozen_and_in_evaluation_mode(checkpoints: dict[str, Path]) -> None:
    model = load_clip(checkpoints["clip"]).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_checkpoint_loads_with_weights_only(checkpoints: dict[str, Path]) -> None:
    content = torch.load(checkpoints["transformer"], weights_only=True)
    assert content["dalle1"]["kind"] == "transformer"


def test_average_of_the_weights_is_preferred(
    tmp_path: Path, make_dvae: Callable[..., DVAE], write_checkpoint: Write
) -> None:
    average = make_dvae(seed=9)
    path = write_checkpoint(tmp_path / "last.ckpt", make_dvae(seed=1), extra={"ema": average.state_dict()})
    loaded = load_dvae(path)
    assert loaded.sha256 == weights_sha256(average.state_dict())


def test_hash_depends_on_names_values_shapes_and_types_but_not_on_order() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0)}
    variants = [
        state,
        {"a": torch.zeros(2, 3), "c": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3), "b": torch.tensor(2.0)},
        {"a": torch.zeros(3, 2), "b": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.tensor(1.0)},
    ]
    assert len({weights_sha256(variant) for variant in variants}) == len(variants)
    assert weights_sha256(dict(reversed(state.items()))) == weights_sha256(state)


def test_another_kind_of_model_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="must hold a dvae, got a clip; give the checkpoint of stage=dvae"):
        load_dvae(checkpoints["clip"])


@pytest.mark.parametrize(
    ("load", "stage"), [(load_dvae, "dvae"), (load_clip, "clip"), (load_transformer, "transformer")]
)
def test_missing_file_says_which_stage_to_train(tmp_path: Path, load: Callable[[Path], Any], stage: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no {stage} at '.*nothing\.ckpt'; train it \(stage={stage}\)"):
        load(tmp_path / "nothing.ckpt")


def _with_record(source: Path, path: Path, **changes: object) -> Path:
    content = torch.load(source, weights_only=True)
    content["dalle1"] |= changes
    torch.save(content, path)
    return path


def test_newer_format_is_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    path = _with_record(checkpoints["dvae"], tmp_path / "changed.ckpt", format_version=2)
    with pytest.raises(ValueError, match="must have format version 1, got 2; use the dalle1 version that wrote it"):
        read_checkpoint(path)


def test_unknown_configuration_is_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    path = _with_record(checkpoints["dvae"], tmp_path / "changed.ckpt", model_config={"vocab_sise": 3})
    with pytest.raises(ValueError, match=r"does not know: .*unexpected keyword argument 'vocab_sise'"):
        load_dvae(path)


def test_weights_of_another_size_are_refused_in_one_line(
    tmp_path: Path, checkpoints: dict[str, Path], make_dvae: Callable[..., DVAE]
) -> None:
    other = make_record(make_dvae(n_hid=16))["model_config"]
    path = _with_record(checkpoints["dvae"], tmp_path / "changed.ckpt", model_config=other)
    with pytest.raises(ValueError, match=r"does not fit its own configuration: .*size mismatch") as raised:
        load_dvae(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"dalle1": "text"}])
def test_file_without_a_record_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="must hold a 'dalle1' record"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_record_without_its_parts_is_refused(tmp_path: Path) -> None:
    torch.save({"dalle1": {"format_version": 1, "kind": "dvae", "model_config": {}}}, tmp_path / "part.ckpt")
    with pytest.raises(
        ValueError, match="it lacks text_tokenizer, dvae_sha256, caption_dropout, state_dict, global_step"
    ):
        read_checkpoint(tmp_path / "part.ckpt")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_damaged_file_is_refused(tmp_path: Path, checkpoints: dict[str, Path], keep: float) -> None:
    data = checkpoints["dvae"].read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match="is not a checkpoint that can be read safely") as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


class _Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.victim,))


def test_file_with_code_is_refused_and_not_executed(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    content = torch.load(checkpoints["dvae"], weights_only=True)
    content["dalle1"]["payload"] = _Malicious(tmp_path / "executed")
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="is not a checkpoint that can be read safely"):
        load_dvae(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()


def test_transformer_with_its_own_dvae_passes(checkpoints: dict[str, Path]) -> None:
    check_pair(load_transformer(checkpoints["transformer"]), load_image_tokenizer(checkpoints["dvae"]))


def test_transformer_with_another_dvae_is_refused(
    tmp_path: Path, checkpoints: dict[str, Path], make_dvae: Callable[..., DVAE], write_checkpoint: Write
) -> None:
    other = write_checkpoint(tmp_path / "other.ckpt", make_dvae(seed=5))
    transformer, image_tokenizer = load_transformer(checkpoints["transformer"]), load_image_tokenizer(other)
    expected = (
        f"needs the dVAE it was trained with, {str(transformer.dvae_sha256)[:12]}, got {image_tokenizer.sha256[:12]}"
    )
    with pytest.raises(ValueError, match=expected):
        check_pair(transformer, image_tokenizer)


LOADERS = {"dvae": load_dvae, "clip": load_clip, "transformer": load_transformer}


@pytest.fixture(scope="module")
def exported(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an exported checkpoint of each stage; tests must not change it."""
    directory = tmp_path_factory.mktemp("exported")
    for kind, load in LOADERS.items():
        loaded: Loaded[Any] = load(checkpoints[kind])
        record = make_record(
            loaded.model,
            text_tokenizer=loaded.text_tokenizer,
            dvae_sha256=loaded.dvae_sha256,
            caption_dropout=0.25,
        )
        assert write_exported(directory / kind, loaded.model, record, step=loaded.step) == loaded.sha256
    return directory


@pytest.mark.parametrize("kind", LOADERS)
def test_exported_checkpoint_is_the_one_it_was_made_from(
    checkpoints: dict[str, Path], exported: Path, kind: str
) -> None:
    load: Callable[[Path], Loaded[Any]] = LOADERS[kind]
    first, second = load(checkpoints[kind]), load(exported / kind)
    assert second.model.config == first.model.config
    assert weights_sha256(second.model.state_dict()) == second.sha256 == first.sha256
    assert (second.step, second.dvae_sha256, second.caption_dropout) == (7, first.dvae_sha256, 0.25)
    assert (second.text_tokenizer is None) == (first.text_tokenizer is None)
    if first.text_tokenizer and second.text_tokenizer:
        assert second.text_tokenizer.sha256 == first.text_tokenizer.sha256
    assert not second.model.training
    assert not any(parameter.requires_grad for parameter in second.model.parameters())
    files = {"config.json", "model.safetensors"} | ({"tokenizer.json"} if first.text_tokenizer else set())
    assert {path.name for path in (exported / kind).iterdir()} == files
    assert len({path.stat().st_mode for path in (exported / kind).iterdir()}) == 1


def test_exported_checkpoint_has_the_content_that_training_writes(checkpoints: dict[str, Path], exported: Path) -> None:
    first, second = read_checkpoint(checkpoints["dvae"]), read_checkpoint(exported / "dvae")
    assert second["dalle1"].items() >= (first["dalle1"] | {"caption_dropout": 0.25}).items()
    assert second["global_step"] == 7
    assert second["state_dict"].keys() == first["state_dict"].keys()
    assert all(torch.equal(second["state_dict"][name], first["state_dict"][name]) for name in first["state_dict"])


def test_exported_weights_are_those_of_the_average(
    tmp_path: Path, make_dvae: Callable[..., DVAE], write_checkpoint: Write
) -> None:
    average = make_dvae(seed=9)
    path = write_checkpoint(tmp_path / "last.ckpt", make_dvae(seed=1), extra={"ema": average.state_dict()})
    model = load_dvae(path).model
    write_exported(tmp_path / "out", model, make_record(model), step=1)
    assert load_dvae(tmp_path / "out").sha256 == weights_sha256(average.state_dict())


def test_existing_directory_is_not_written_into(tmp_path: Path, make_dvae: Callable[..., DVAE]) -> None:
    model = make_dvae()
    (tmp_path / "out").mkdir()
    write_exported(tmp_path / "out", model, make_record(model), step=0)
    with pytest.raises(FileExistsError, match=r"out must not exist yet or be an empty directory, got '.*out'"):
        write_exported(tmp_path / "out", make_dvae(seed=2), make_record(model), step=0)
    assert load_dvae(tmp_path / "out").sha256 == weights_sha256(model.state_dict())


@pytest.mark.parametrize("function", ["save_file", "write_json"])
def test_failure_in_writing_leaves_nothing(
    tmp_path: Path, make_dvae: Callable[..., DVAE], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("disk full")

    model = make_dvae()
    monkeypatch.setattr(checkpoint_module, function, fail)
    with pytest.raises(OSError, match="disk full"):
        write_exported(tmp_path / "out", model, make_record(model), step=0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copy(tmp_path: Path, exported: Path) -> Path:
    """An exported dVAE that tests may change."""
    return Path(shutil.copytree(exported / "dvae", tmp_path / "copy"))


def test_changed_weights_are_noticed(copy: Path) -> None:
    sha256 = load_dvae(copy).sha256
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(ValueError, match=f"is damaged: its weights must have the hash .*, {sha256[:12]}, got [0-9a-f]"):
        load_dvae(copy)


def test_changed_byte_of_a_training_checkpoint_is_noticed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(checkpoints["dvae"], tmp_path / "last.ckpt"))
    tensor = load_dvae(path).model.state_dict()["decoder.head.weight"]
    content = bytearray(path.read_bytes())
    at = content.index(tensor.numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"'.*last\.ckpt' is damaged: '.*' in it has another checksum"):
        load_dvae(path)


def test_damaged_list_of_contents_is_damage(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(checkpoints["dvae"].read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 46] |= 0x80  # the first letter of a name, which is then no UTF-8
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="is not a checkpoint that can be read safely"):
        load_dvae(tmp_path / "last.ckpt")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_damaged_export_is_refused(copy: Path, name: str, keep: float) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match="is not a checkpoint that can be read safely") as raised:
        load_dvae(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_export_without_a_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"it has no {name}; of a stage's results give .*/last\.ckpt"):
        load_dvae(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "must have format version 1, got 2"),
        ({"kind": "clip"}, "must hold a dvae, got a clip"),
        ({"model_config": {"vocab_sise": 3}}, r"does not know: .*unexpected keyword argument 'vocab_sise'"),
        ({"weights_sha256": "0" * 64}, "hash that its config.json names, 000000000000, got [0-9a-f]"),
        ({"step": ...}, "must hold all parts of a checkpoint, it lacks step"),
        ({"weights_sha256": ...}, "must hold all parts of a checkpoint, it lacks weights_sha256"),
        ({"dvae_sha256": ..., "kind": ...}, "it lacks kind, dvae_sha256"),
        ({"format_version": ...}, "must hold a 'dalle1' record, as all our checkpoints do; it has none"),
    ],
)
def test_export_with_another_record_is_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    content = json.loads((copy / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_dvae(copy)


def test_safetensors_of_another_model_are_refused(copy: Path, exported: Path) -> None:
    shutil.copy(exported / "clip" / "model.safetensors", copy)
    with pytest.raises(ValueError, match=r"does not fit its own configuration: .*Missing key"):
        load_dvae(copy)
