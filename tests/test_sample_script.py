"""sample.py as users call it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.checkpoint import Loaded, load_clip, load_dvae, load_transformer, make_record, write_exported
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "sample.py"
NASTY = """it's "a", (b) = ${x}; #1 🐉"""


def _call(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def work(tmp_path: Path, run_directory: Path) -> Path:
    """A directory to run in, with the checkpoints of all stages."""
    for stage in ("transformer", "dvae", "clip"):
        directory = tmp_path / "runs" / "shapes" / stage
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.symlink_to(run_directory / "runs" / "shapes" / stage)
    return tmp_path


@pytest.fixture
def sample(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls the script's main part in this process; starting Python and importing torch takes seconds."""
    spec = importlib.util.spec_from_file_location("sample", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(work)

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        module.main()

    return call


def test_script_samples_any_prompt_and_says_where_the_pictures_are(work: Path) -> None:
    done = _call(work, f"prompt={NASTY}", "candidates=3")
    assert (done.returncode, done.stderr) == (0, "")
    first, grid, gallery, manifest = done.stdout.splitlines()
    assert first.startswith("3 pictures, best score ")
    (directory,) = (work / "runs" / "shapes" / "samples").iterdir()
    assert directory.name.startswith("it-s-a-b-x-1-")
    assert work / gallery.removeprefix("gallery:").strip() == directory / "index.html"
    assert work / grid.removeprefix("grid:").strip() == directory / "grid.png"
    content = json.loads((work / manifest.removeprefix("manifest:").strip()).read_text(encoding="utf-8"))
    assert content["settings"]["prompt"] == content["prompts"][0]["prompt"] == NASTY
    scores = [picture["score"] for picture in content["prompts"][0]["pictures"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(path.name for path in work.iterdir()) == ["runs"], "Hydra leaves nothing behind"


def test_script_without_checkpoints_says_what_to_train(tmp_path: Path) -> None:
    done = _call(tmp_path, "prompt=a", "rerank=none", "name=new")
    assert done.returncode == 1
    assert done.stdout == ""
    expected = "error: no dvae at 'runs/new/dvae/checkpoints/last.ckpt'; train it (stage=dvae) or correct the path\n"
    assert done.stderr == expected


def test_same_seed_gives_the_same_files_and_another_seed_others(work: Path, sample: Callable[..., None]) -> None:
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        sample("prompt=a red circle", "candidates=2", f"seed={seed}", f"out={out}")
    names = ["0001-a-red-circle-0000.png", "0001-a-red-circle-0001.png", "grid.png"]
    for name in names:
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes()
        assert (work / "one" / name).read_bytes() != (work / "three" / name).read_bytes()


def test_prompts_file_without_ranking(work: Path, sample: Callable[..., None]) -> None:
    (work / "my prompts, (1).txt").write_text("a red circle\n\n日本\n", encoding="utf-8")
    sample("prompts_file=my prompts, (1).txt", "candidates=2", "rerank=none", "batch_size=3", "out=my = out")
    content = json.loads((work / "my = out" / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["prompt"] for entry in content["prompts"]] == ["a red circle", "日本"]
    assert [picture["score"] for picture in content["prompts"][0]["pictures"]] == [None, None]
    assert content["reranker"] is None
    with Image.open(work / "my = out" / "grid.png") as grid:
        assert grid.width == 384


def test_temperatures_of_rows_are_in_the_manifest(work: Path, sample: Callable[..., None]) -> None:
    sample("prompt=a", "candidates=2", "rerank=none", "temperature=[1,0.5,0]", "out=rows")
    settings = json.loads((work / "rows" / "manifest.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["temperature"], settings["temperature_end"]) == ([1, 0.5, 0], None)


def _manifest(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return content


def _pixels(directory: Path) -> dict[str, bytes]:
    pictures = {}
    for path in directory.glob("0*.png"):
        with Image.open(path) as picture:
            pictures[path.name] = picture.tobytes()
    return pictures


def test_best_are_kept_of_many_and_more_can_be_sampled_later(work: Path, sample: Callable[..., None]) -> None:
    sample("prompt=a red circle", "candidates=6", "keep=2", "out=run")
    first = _manifest(work / "run")["prompts"][0]
    assert (first["sampled"], len(first["pictures"])) == (6, 2)
    sample("prompt=a red circle", "candidates=9", "out=run")
    more = _manifest(work / "run")["prompts"][0]
    assert (more["sampled"], len(more["pictures"])) == (9, 9)
    sample("prompt=a red circle", "candidates=9", "out=other")
    assert _pixels(work / "run") == _pixels(work / "other")
    assert more == _manifest(work / "other")["prompts"][0]


def test_same_command_twice_is_one_directory(work: Path, sample: Callable[..., None]) -> None:
    for _ in range(2):
        sample("prompt=a red circle", "candidates=2")
    sample("prompt=a red circle", "candidates=2", "seed=1")
    assert len(list((work / "runs" / "shapes" / "samples").iterdir())) == 2


class _Interrupt:
    """Takes the place of the progress bar, and is Ctrl-C at its n-th step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> _Interrupt:
        return self

    def __enter__(self) -> _Interrupt:
        return self

    def __exit__(self, *error: object) -> None: ...

    def finished(self, pictures: int) -> None: ...

    def sampled(self, progress: object) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_interrupted_run_keeps_what_is_done_and_goes_on(
    work: Path, sample: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "prompts.txt").write_text("a red circle\na blue square\ntwo green stars\n")
    command = ["prompts_file=prompts.txt", "candidates=5", "batch_size=2", "out=run", "preview_every=1"]
    with monkeypatch.context() as patched:
        patched.setattr("dalle1.sample.ProgressBar", _Interrupt(12 * 5 + 6))  # 3 of the second prompt's 5 are begun
        with pytest.raises(SystemExit) as raised:
            sample(*command)
    assert raised.value.code == 130
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "interrupted: writing the pictures that are done; again to stop at once",
        "interrupted",
    ]
    assert printed.out.startswith("9 pictures, best score")
    assert printed.out.endswith("the same command goes on with the rest\n")
    partial = _manifest(work / "run")
    assert not partial["complete"]
    assert [entry["sampled"] for entry in partial["prompts"]] == [5, 4]
    assert not (work / "run" / "preview.png").exists()

    steps = _Interrupt(0)
    with monkeypatch.context() as patched:
        patched.setattr("dalle1.sample.ProgressBar", steps)
        sample(*command)
    assert steps.left == -12 * 4, "four batches were missing"
    sample(*command[:3], "out=whole")
    assert _manifest(work / "run")["complete"]
    assert _manifest(work / "run")["prompts"] == _manifest(work / "whole")["prompts"]
    assert _pixels(work / "run") == _pixels(work / "whole")


def test_interrupted_before_anything_is_done_leaves_nothing(
    work: Path, sample: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle1.sample.ProgressBar", _Interrupt(3))
    with pytest.raises(SystemExit):
        sample("prompt=a", "candidates=2", "out=run")
    assert not (work / "run").exists()


def test_disk_that_is_full_loses_nothing(
    work: Path, sample: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("dalle1.results.save_picture", fail)
        with pytest.raises(SystemExit) as raised:
            sample("prompt=a", "candidates=2", "out=run")
    assert raised.value.code == 1
    assert capsys.readouterr().err == (
        "error: cannot write to 'run' ([Errno 28] No space left on device); what is done stays in 'run', and the same "
        "command goes on with the rest\n"
    )
    monkeypatch.setattr("dalle1.pipeline.Sampler.blocks", fail)  # nothing is left to sample
    sample("prompt=a", "candidates=2", "out=run")
    assert len(_pixels(work / "run")) == 2


def test_what_was_chosen_is_neither_decoded_nor_ranked_again(
    work: Path, sample: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "prompts.txt").write_text("a\nb\n")
    command = ["prompts_file=prompts.txt", "candidates=4", "keep=2", "out=run"]
    sample(*command)
    before = _pixels(work / "run")
    decoded: list[int] = []
    decode = ImageTokenizer.decode
    monkeypatch.setattr(ImageTokenizer, "decode", lambda *args: decoded.append(1) or decode(*args))
    sample(*command)
    assert not decoded
    assert _pixels(work / "run") == before
    (work / "run" / "tokens" / "0002.json").unlink()
    sample(*command)
    assert len(decoded) == 4, "the second prompt's"
    sample(*command[:2], "keep=3", "out=run")
    assert len(decoded) == 12
    assert len(_pixels(work / "run")) == 6


def test_sigterm_is_as_good_as_ctrl_c(
    work: Path, sample: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    class Bar(_Interrupt):
        def sampled(self, progress: object) -> None:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dalle1.sample.ProgressBar", Bar(15))
        with pytest.raises(SystemExit) as raised:
            sample("prompt=a red circle", "candidates=3", "batch_size=1", "out=run")
    assert raised.value.code == 130
    assert capsys.readouterr().out.startswith("1 picture, best score")
    assert signal.getsignal(signal.SIGTERM) is before


def test_out_that_cannot_be_written_is_told(
    work: Path, sample: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "file").write_text("")
    with pytest.raises(SystemExit):
        sample("prompt=a", "candidates=1", "out=file/run")
    assert capsys.readouterr().err.startswith("error: out must be a directory that can be written to, got 'file/run' (")


def test_run_that_was_killed_goes_on_with_what_is_on_the_disk(work: Path, sample: Callable[..., None]) -> None:
    class Killed(BaseException):
        """Nothing of ours handles it, as nothing handles SIGKILL."""

    class Bar(_Interrupt):
        def sampled(self, progress: object) -> None:
            self.left -= 1
            if not self.left:
                raise Killed

    command = ["prompt=a red circle", "candidates=7", "batch_size=2", "out=run", "preview_every=1"]
    sample(*command[:3], "out=whole")
    for steps in (5, 12 + 5, 12 + 5, 12 + 3):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("dalle1.sample.ProgressBar", Bar(steps))
            with pytest.raises(Killed):
                sample(*command)
    sample(*command)
    assert _pixels(work / "run") == _pixels(work / "whole")
    assert np.array_equal(*(np.load(work / out / "tokens" / "0001.npy") for out in ("run", "whole")))


def test_preview_shows_rows_that_are_done(
    work: Path, sample: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Look(_Interrupt):
        def sampled(self, progress: Any) -> None:
            path = work / "run" / "preview.png"
            seen.append((progress.positions_done, path.exists()))

    monkeypatch.setattr("dalle1.sample.ProgressBar", Look(0))
    sample("prompt=a", "candidates=2", "out=run", "preview_every=2")
    assert [position for position, there in seen if there] == [9, 10, 11, 12], "after two rows of four"
    assert not (work / "run" / "preview.png").exists()


def test_picture_is_gone_on_with(work: Path, sample: Callable[..., None]) -> None:
    sample("prompt=a red circle", "candidates=1", "out=first")
    first = "first/0001-a-red-circle-0000.png"
    sample(f"image={first}", "variations=3", "out=variations", "paste_kept=true")
    manifest = _manifest(work / "variations")
    assert [entry["prompt"] for entry in manifest["prompts"]] == ["a red circle"], "the picture knows its prompt"
    tokens = np.load(work / "variations" / "tokens" / "0001.npy")
    assert (tokens[:, 0] == np.load(work / "first" / "tokens" / "0001.npy")[0, 0]).all(), "one row of three stays"
    with Image.open(work / first) as picture, Image.open(work / "variations" / "0001-a-red-circle-0002.png") as varied:
        assert np.array_equal(np.asarray(picture)[:4], np.asarray(varied)[:4])
    mask = Image.new("L", (16, 12))
    mask.putpixel((0, 0), 255)
    mask.save(work / "mask.png")
    sample(f"image={first}", "mask=mask.png", "prompt=two green stars", "candidates=4", "out=masked")
    tokens = np.load(work / "masked" / "tokens" / "0001.npy").reshape(4, 12)
    assert (tokens[:, 1:] == tokens[0, 1:]).all()
    assert {"image.png", "mask.png"} < {path.name for path in (work / "masked").iterdir()}


def test_run_is_ranked_again_without_sampling(
    work: Path, sample: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample("prompt=a red circle", "candidates=5", "out=run", "rerank=none")
    pixels = _pixels(work / "run")
    monkeypatch.setattr("dalle1.pipeline.Sampler", None)
    sample("rerank.only=run", "rerank=image_likelihood")
    by_likelihood = _manifest(work / "run")
    assert by_likelihood["reranker"]["kind"] == by_likelihood["settings"]["rerank"]["kind"] == "image_likelihood"
    assert by_likelihood["settings"]["candidates"] == 5, "what it was sampled with stays"
    scores = [picture["score"] for picture in by_likelihood["prompts"][0]["pictures"]]
    assert scores == sorted(scores, reverse=True)
    assert max(scores) < 0
    assert _pixels(work / "run") == pixels
    sample("rerank.only=run", "keep=2")
    sample("rerank.only=run", "rerank=image_likelihood")
    assert len(_pixels(work / "run")) == 2, "as many as before"
    sample("rerank.only=run", "rerank=none", "keep=5")
    assert [each["candidate"] for each in _manifest(work / "run")["prompts"][0]["pictures"]] == [0, 1, 2, 3, 4]
    assert _pixels(work / "run") == pixels


def test_likelihood_of_a_transformer_of_another_dvae_ranks_nothing(
    work: Path,
    sample: Callable[..., None],
    make_transformer: Callable[..., Any],
    text_tokenizer: TextTokenizer,
    write_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sample("prompt=a", "candidates=1", "out=run")
    write_checkpoint(work / "other.ckpt", make_transformer(), text_tokenizer=text_tokenizer, dvae_sha256="x")
    with pytest.raises(SystemExit):
        sample("rerank.only=run", "rerank=image_likelihood", "transformer=other.ckpt")
    assert "the transformer needs the dVAE it was trained with" in capsys.readouterr().err


def test_run_of_another_dvae_is_not_ranked(
    work: Path,
    sample: Callable[..., None],
    make_dvae: Callable[..., Any],
    write_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sample("prompt=a", "candidates=1", "out=run")
    write_checkpoint(work / "other.ckpt", make_dvae(seed=5))
    with pytest.raises(SystemExit):
        sample("rerank.only=run", "dvae=other.ckpt")
    assert "'run' was sampled with dVAE" in capsys.readouterr().err


def test_exported_checkpoints_give_the_same_pictures(work: Path, sample: Callable[..., None]) -> None:
    stages = {"transformer": load_transformer, "dvae": load_dvae, "clip": load_clip}
    for stage, load in stages.items():
        loaded: Loaded[Any] = load(work / "runs" / "shapes" / stage / "checkpoints" / "last.ckpt")
        record = make_record(loaded.model, text_tokenizer=loaded.text_tokenizer, dvae_sha256=loaded.dvae_sha256)
        write_exported(work / "my exported" / stage, loaded.model, record, step=loaded.step)
    sample("prompt=a red circle", "candidates=2", "out=one")
    exported = ["transformer=my exported/transformer", "dvae=my exported/dvae", "rerank.model=my exported/clip"]
    sample("prompt=a red circle", "candidates=2", "out=two", *exported)
    for name in ("0001-a-red-circle-0000.png", "0001-a-red-circle-0001.png"):
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either prompt=... or prompts_file=..., got neither"),
        (["prompt="], "prompt must not be empty"),
        (["prompt=" + "z" * 41], "prompt must have at most 40 tokens, as the transformer was trained with, got 41"),
        (["prompt=a", "candidates=0"], "candidates must be >= 1, got 0"),
        (["prompt=a", "candidates=many"], "candidates must be an integer >= 1, got 'many'"),
        (["prompt=a", "temperature=-1"], "temperature must be a finite number >= 0 (0 is greedy), got -1"),
        (["prompt=a", "temperature=[1,2]"], "temperature must be one number or one for each of 3 rows, got 2"),
        (["prompt=a", "temperature=hot"], "SamplingConfig.temperature must be a number, got 'hot'"),
        (["prompt=a", "negative_prompt=b"], "a negative prompt needs a guidance_scale other than 1, got 1"),
        (["prompt=a", "guidance_scale=2"], "guidance needs a transformer trained with optim.caption_dropout > 0"),
        (["prompt=a", "rerank=best"], "Available options in 'rerank'"),
        (["prompt=a", "rerank=hf_clip"], "rerank=hf_clip needs a model, got none; give a directory or a name"),
        (["prompt=a", "rerank=caption_likelihood"], "needs a transformer trained with optim.caption_dropout > 0"),
        (
            ["prompt=a", "rerank.model=nothing.ckpt"],
            "no CLIP at 'nothing.ckpt'; train it (stage=clip), or do without ranking: rerank=none",
        ),
        (["prompt=a", "out=runs"], "out must not exist yet, be an empty directory or hold a run of the same settings"),
        (["prompt=a", "dvae=${rerank.model}"], "must hold a dvae, got a clip"),
        (["prompt=a", "keep=0"], "keep must be >= 1, got 0"),
        (["prompt=a", "keep=5", "candidates=4"], "keep must be at most the number of candidates, 4, got 5"),
        (["prompt=a", "compile=no"], "compile must be true or false, got 'no'"),
        (["prompt=a", "paste_kept=maybe"], "paste_kept must be true or false, got 'maybe'"),
        (["prompt=a", "rerank.allow_download=off"], "rerank.allow_download must be true or false, got 'off'"),
        (["prompt=a", "out="], "out must name a directory, got nothing"),
        (["prompt=a", "seed=x"], "seed must be an integer >= 0, got 'x'"),
        (["prompt=a", "image=runs", "keep_rows=1"], "'runs' cannot be read: Is a directory"),
        (["prompt=a", "top_p=2"], "SamplingConfig.top_p must be in (0, 1] (1 means all codes), got 2"),
        (["prompt=a", "batch_size=some"], "batch_size must be an integer >= 1, got 'some'"),
        (["prompt=a", "preview_every=0"], "preview_every must be >= 1, got 0"),
        (["prompt=a", "keep_rows=1"], "keep_rows says what of a picture stays, so it needs image=..., got none"),
        (["prompt=a", "paste_kept=true"], "paste_kept says what of a picture stays, so it needs image=..., got none"),
        (["prompt=a", "compile=true"], "compiled decoding is for CUDA, got device cpu; leave out compile"),
        (["prompt=a", "precision=fp8"], "precision must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        (["prompt=a", "rerank=none", "rerank.model=x"], "rerank=none takes no model, got rerank.model=x; leave it out"),
        (
            ["rerank.only=nothing", "preview_every=2"],
            "with rerank.only, which ranks what its directory holds, leave out",
        ),
        (["prompt=a", "variations=2"], "variations says what of a picture stays, so it needs image=..., got none"),
        (["prompt=a", "image=nothing.png"], "image must be a picture, there is none at 'nothing.png'"),
        (["prompt=a", "image=text.png"], "image must be a JPEG, PNG or WebP file, 'text.png' cannot be read"),
        (
            ["prompt=a", "image=photo.png"],
            "an image needs either keep_rows=... or mask=..., which say what of it stays",
        ),
        (["prompt=a", "image=photo.png", "keep_rows=3"], "keep_rows must leave some of the 3 rows of tokens to sample"),
        (["prompt=a", "image=photo.png", "mask=small.png"], "mask must have the size of its picture, 40 x 30"),
        (["image=photo.png", "keep_rows=1"], "give prompt=... too: 'photo.png' was not sampled here"),
        (["prompt=a", "image=photo.png", "variations=0"], "variations must be >= 1, got 0"),
        (["rerank.only=nothing"], "'nothing' must hold a run of sample.py, it has no manifest.json"),
        (
            ["rerank.only=nothing", "prompt=a"],
            "with rerank.only, which ranks what its directory holds, leave out prompt=a",
        ),
        (["prompt=a", "device=toaster"], "device must be auto or one that PyTorch can use here, got 'toaster'"),
        (["prompt=a", "candidate=3"], "there is no option 'candidate'; did you mean 'candidates'?"),
        (["prompts_file=nothing.txt"], "there is none at 'nothing.txt'"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(
    work: Path, sample: Callable[..., None], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (work / "text.png").write_text("no picture")
    Image.new("RGB", (40, 30)).save(work / "photo.png")
    Image.new("L", (5, 5)).save(work / "small.png")
    before = sorted(work.rglob("*"))
    with pytest.raises(SystemExit) as raised:
        sample(*arguments)
    assert raised.value.code in (1, 2)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert sorted(work.rglob("*")) == before


def test_help_names_the_options(sample: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        sample("--help")
    assert raised.value.code == 0
    output = capsys.readouterr().out
    assert 'python sample.py prompt="a red circle above a blue square"' in output
    assert "candidates: 16" in output
