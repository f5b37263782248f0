"""Converting released weights: the command, what it leaves, and training and sampling on its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import official_dvae
import pytest
import torch

from dalle1 import convert
from dalle1.checkpoint import load_dvae, load_image_tokenizer, weights_sha256

ROOT = Path(__file__).resolve().parent.parent
SIZES = official_dvae.Sizes(vocab=32, n_hid=8, n_init=8, groups=3, blocks=1)
Convert = Callable[..., int]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with encoder.pkl and decoder.pkl."""
    directory = tmp_path_factory.mktemp("official")
    for name, part in zip(("encoder", "decoder"), official_dvae.make_official(SIZES), strict=True):
        official_dvae.save_official(part, directory / f"{name}.pkl")
    return directory


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: Path) -> Convert:
    """Calls the command in this process, with files of their own for the options given; returns the exit code."""

    def call(**paths: Path) -> int:
        options = {"encoder": files / "encoder.pkl", "decoder": files / "decoder.pkl", "out": tmp_path / "out"} | paths
        arguments = [part for name, path in options.items() for part in (f"--{name}", str(path))]
        monkeypatch.setattr(sys, "argv", ["dalle1.convert", "openai-dvae", *arguments])
        try:
            convert.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


def test_command_writes_a_checkpoint_and_says_what_is_next(tmp_path: Path, files: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dalle1.convert", "openai-dvae", "--out", "my dvae"]
    command += ["--encoder", str(files / "encoder.pkl"), "--decoder", str(files / "decoder.pkl")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = load_dvae(tmp_path / "my dvae")
    n_weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    first, written, following = done.stdout.splitlines()
    assert first == f"dVAE of {n_weights:,} weights: 32 codes, one token for 4x4 pixels"
    assert written == f"written: my dvae (hash of the weights {loaded.sha256[:12]})"
    expected = (
        "next:    python train.py stage=transformer 'dvae=my dvae' image_vocab_size=32 image_size=128 grid_size=32"
    )
    assert following == f"{expected} ..."
    assert {path.name for path in tmp_path.rglob("*")} == {"my dvae", "config.json", "model.safetensors"}


def test_result_is_the_official_model(tmp_path: Path, call: Convert, capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    assert capsys.readouterr().err == ""
    loaded = load_dvae(tmp_path / "out")
    encoder, decoder = official_dvae.make_official(SIZES)
    image = torch.rand(1, 3, 8, 12)
    with torch.no_grad():
        logits = official_dvae.reference_logits(encoder, image)
        torch.testing.assert_close(loaded.model.logits(image).permute(0, 3, 1, 2), logits, rtol=0, atol=1e-5)
        tokens = load_image_tokenizer(tmp_path / "out").encode(image)
        assert torch.equal(tokens, logits.argmax(1))
        expected = official_dvae.reference_pictures(decoder, tokens)
    torch.testing.assert_close(load_image_tokenizer(tmp_path / "out").decode(tokens), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["weights_sha256"] == loaded.sha256 == weights_sha256(loaded.model.state_dict())
    assert (config["kind"], config["step"], config["model_config"]["post_gain"]) == ("dvae", 0, 0.0)


def test_same_files_in_another_form_give_the_same_hash(tmp_path: Path, call: Convert) -> None:
    parts = dict(zip(("encoder", "decoder"), official_dvae.make_official(SIZES), strict=True))
    hashes = set()
    for form in official_dvae.FORMS:
        paths = {
            name: official_dvae.save_official(part, tmp_path / f"{name}-{form}", form) for name, part in parts.items()
        }
        assert call(**paths, out=tmp_path / form) == 0
        hashes.add(load_dvae(tmp_path / form).sha256)
    assert len(hashes) == 1


def _cut(path: Path, files: Path) -> None:
    path.write_bytes((files / "encoder.pkl").read_bytes()[:2000])


def _nan(path: Path, files: Path) -> None:
    encoder = official_dvae.make_official(SIZES)[0]
    with torch.no_grad():
        encoder.blocks[0].b[3] = float("nan")
    official_dvae.save_official(encoder, path)


def _script(path: Path, files: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {path.with_name('marker')}",)

    torch.save({"w": Evil()}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_cut, "evil.pkl' is damaged or cut short"),
        (_nan, "the encoder's 'blocks.input.b' must be finite, it holds NaN or infinity; get the file again"),
        (_script, "must hold only weights and modules that are known, it names 'posix.system'; nothing in it was run"),
        (lambda path, files: path.write_text("<html>"), "it begins with b'<html>'"),
        (lambda path, files: None, "no weights at '"),
        (lambda path, files: path.symlink_to(files / "decoder.pkl"), "got a decoder and a decoder"),
    ],
)
def test_bad_file_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    files: Path,
    call: Convert,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path, Path], object],
    message: str,
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    write(tmp_path / "evil.pkl", files)
    assert call(encoder=tmp_path / "evil.pkl", out=work / "runs" / "out") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(work.iterdir()) == []
    assert not (tmp_path / "marker").exists()


def test_existing_directory_is_never_touched(tmp_path: Path, call: Convert, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    # Before the files are read.
    assert call(out=tmp_path, encoder=tmp_path / "nothing") == 1
    expected = f"error: out must not exist yet or be an empty directory, got '{tmp_path}'; choose another one\n"
    assert capsys.readouterr() == ("", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_wrong_command_line_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([], "required: WHAT"),
        (["openai-clip"], "invalid choice: 'openai-clip'"),
        (["openai-dvae", "--encoder", "a"], "required: --decoder, --out"),
    ):
        monkeypatch.setattr(sys, "argv", ["dalle1.convert", *arguments])
        with pytest.raises(SystemExit, match="2"):
            convert.main()
        assert message in capsys.readouterr().err
