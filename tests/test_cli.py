"""The command line: free text for Hydra's grammar, and errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from dalle1.cli import OptionError, dashed_options, describe, errors_in_one_line, quote_options, run_script


def _value_after_hydra(argument: str) -> object:
    """What a configuration holds after an override, interpolations resolved."""
    override = OverridesParser.create().parse_override(argument)
    config = OmegaConf.create({"name": "shapes", override.key_or_group: override.value()})
    return config[override.key_or_group]


# Letters that mean something to the shell's users, Hydra's grammar or OmegaConf, and some that are not ASCII.
_TEXT = st.text(alphabet=st.sampled_from(" ab0,='\"\\${}()[]:;#?<>&|~!@%^*+-./\n\téß日🐉")) | st.text(
    alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")
)


@given(text=_TEXT.filter(lambda text: text != "???"))
@example(text="a red circle, above (a) 'blue' \"square\" = #1; ${x} ??? 🐉")
@example(text="'")
@example(text="\\")
@example(text="${name}")
@example(text="\\${name}\\")
@example(text="null")
@example(text="12")
@example(text="[1, 2]")
@example(text="'a' and 'b'")
def test_any_text_arrives_literally(text: str) -> None:
    (argument,) = quote_options([f"prompt={text}"], text_options=["prompt"])
    again = quote_options([argument], text_options=["prompt"])
    assert again == [argument], "quoting twice changes nothing"
    if not (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):  # quoted by the user already
        assert _value_after_hydra(argument) == text


def test_text_that_the_user_quoted_for_hydra_stays() -> None:
    assert quote_options(['prompt="a, b"'], text_options=["prompt"]) == ['prompt="a, b"']


def test_path_may_contain_anything_and_refer_to_other_options() -> None:
    (argument,) = quote_options(["out=runs/${name}/step=3, (a)"], path_options=["out"])
    assert _value_after_hydra(argument) == "runs/shapes/step=3, (a)"


def test_path_null_is_no_path() -> None:
    assert quote_options(["out=null"], path_options=["out"]) == ["out=null"]


def test_list_of_paths_stays_a_list() -> None:
    (argument,) = quote_options(["data.train=[a-*.tar,b.tar]"], path_options=["data.train"])
    assert _value_after_hydra(argument) == ["a-*.tar", "b.tar"]
    (argument,) = quote_options(["data.train=a-[0-2].tar"], path_options=["data.train"])
    assert _value_after_hydra(argument) == "a-[0-2].tar"
    (argument,) = quote_options(
        ["data.train=[a-[0-2].tar, ~/my (1)/\u00e9=x.tar,007,'quoted.tar']"], path_options=["data.train"]
    )
    assert _value_after_hydra(argument) == ["a-[0-2].tar", "~/my (1)/\u00e9=x.tar", "007", "quoted.tar"]


def test_braces_in_a_list_of_paths_stay_together() -> None:
    (argument,) = quote_options(["data.train=[x/{00..12}.tar,{a,b}.tar,c.tar]"], path_options=["data.train"])
    assert _value_after_hydra(argument) == ["x/{00..12}.tar", "{a,b}.tar", "c.tar"]


def test_list_with_mappings_is_hydras() -> None:
    for text in (
        "[{path:a-*.tar,weight:2.5},b.tar]",
        "[{path:'x/{0..3}.tar', weight: 2.5}]",
        '[b.tar,{"path": [a,b]}]',
    ):
        assert quote_options([f"data.train={text}"], path_options=["data.train"]) == [f"data.train={text}"]
    expected = [{"path": "a-*.tar", "weight": 2.5}, "b.tar"]
    assert _value_after_hydra("data.train=[{path:a-*.tar,weight:2.5},b.tar]") == expected


def test_path_of_digits_stays_text() -> None:
    (argument,) = quote_options(["out=007"], path_options=["out"])
    assert _value_after_hydra(argument) == "007"


def test_other_options_and_flags_stay() -> None:
    arguments = ["candidates=3", "-m", "--cfg", "job", "+new=1", "--config-name=x", "a=b=c", "word"]
    assert quote_options(arguments, text_options=["prompt"], path_options=["out"]) == arguments


def test_sweep_stays_under_multirun_and_is_one_path_otherwise() -> None:
    assert quote_options(["-m", "dvae=a.ckpt,b.ckpt"], path_options=["dvae"]) == ["-m", "dvae=a.ckpt,b.ckpt"]
    assert quote_options(["dvae=a.ckpt,b.ckpt"], path_options=["dvae"]) == ["dvae='a.ckpt,b.ckpt'"]


def test_text_that_means_missing_is_refused() -> None:
    with pytest.raises(OptionError, match=r"prompt must not be '\?\?\?'"):
        quote_options(["prompt=???"], text_options=["prompt"])


@pytest.mark.parametrize("argument", ["--prompt", "--candidates=3"])
def test_option_with_dashes_is_refused(argument: str) -> None:
    with pytest.raises(OptionError, match=f"options are written without dashes, as .*=.*, got '{argument}'"):
        quote_options([argument], text_options=["prompt"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("x must be >= 1, got 0"), 1, "x must be >= 1, got 0"),
        (ValueError("several\nlines:\n\ta\n\tb"), 1, "several; lines: a, b"),
        (FileNotFoundError("no file"), 1, "no file"),
        (TypeError(), 1, "TypeError"),
        (OptionError("no option"), 2, "no option"),
    ],
)
def test_expected_error_is_one_line_and_a_code(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised, errors_in_one_line():
        raise error
    assert raised.value.code == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {line}\n")


def test_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), errors_in_one_line():
        _ = 1 / 0


def test_control_c_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised, errors_in_one_line():
        raise KeyboardInterrupt
    assert raised.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("variable", ["DALLE1_DEBUG", "HYDRA_FULL_ERROR"])
def test_expected_error_keeps_its_traceback_for_debugging(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match="x"), errors_in_one_line():
        raise ValueError("x")


def test_error_in_a_constructor_names_its_place() -> None:
    config = OmegaConf.create({"model": {"_target_": "dalle1.sampling.filters.SamplingConfig", "top_k": -1}})
    with pytest.raises(InstantiationException) as raised:
        instantiate(config)
    expected = r"SamplingConfig.top_k must be >= 0 (0 means all codes), got -1 (in the configuration at 'model')"
    assert describe(raised.value) == expected


def test_unexpected_error_in_a_constructor_is_not_described() -> None:
    with pytest.raises(InstantiationException) as raised:
        instantiate({"_target_": "operator.truediv", "_args_": [1, 0]})
    assert describe(raised.value) is None


@pytest.fixture
def config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small configuration with a mandatory group."""
    directory = tmp_path / "conf"
    (directory / "stage").mkdir(parents=True)
    (directory / "stage" / "dvae.yaml").write_text("# @package _global_\noptim:\n  lr: 0.1\n  steps: 3\n")
    (directory / "stage" / "clip.yaml").write_text("# @package _global_\noptim:\n  lr: 0.2\n")
    (directory / "app.yaml").write_text(
        "defaults:\n  - stage: ???\n  - _self_\n  - override hydra/job_logging: none\n"
        "  - override hydra/hydra_logging: none\n"
        "candidates: 3\nout: null\nbroken: ${nothing}\n"
        "hydra:\n  output_subdir: null\n  run:\n    dir: .\n  sweep:\n    dir: .\n    subdir: .\n"
    )
    monkeypatch.chdir(tmp_path)
    return directory


def _run(config_dir: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[DictConfig]:
    """Configurations that a task has seen."""
    seen: list[DictConfig] = []

    def task(cfg: DictConfig) -> None:
        seen.append(cfg)
        if cfg.candidates == 0:
            raise ValueError("candidates must be >= 1, got 0")

    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    run_script(task, config_dir=config_dir, config_name="app", path_options=["out"])
    return seen


def test_script_gets_the_configuration_that_the_command_line_asks_for(
    config_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cfg,) = _run(config_dir, monkeypatch, "stage=dvae", "optim.lr=2", "out=a, b")
    assert (cfg.optim.lr, cfg.out, cfg.candidates) == (2, "a, b", 3)


def test_script_sweeps(config_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _run(config_dir, monkeypatch, "-m", "stage=dvae,clip", "candidates=1,2")
    assert [(cfg.optim.lr, cfg.candidates) for cfg in seen] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["stage=dvae", "candidate=3"], 2, "there is no option 'candidate'; did you mean 'candidates'?"),
        (["stage=dvae", "learning_rat=3"], 2, "there is no option 'learning_rat'; --help lists the options"),
        (["stage=dvae", "step=3"], 2, "there is no option 'step'; did you mean 'optim.steps'?"),
        (["stage=dvae", "optm.lr=3"], 2, "there is no option 'optm.lr'; did you mean 'optim.lr'?"),
        (["stage=dvae", "stge=dvae"], 2, "there is no option 'stge'; did you mean 'stage'?"),
        (["stage=dvae", "candidate=3", "optm.lr=3"], 2, "there is no option 'candidate'; --help lists the options"),
        ([], 2, "You must specify 'stage', e.g, stage=<OPTION>; Available options: clip, dvae"),
        (["stage=vae"], 2, "In 'app': Could not find 'stage/vae'; Available options in 'stage': clip, dvae"),
        (
            ["stage=dvae", "a red circle"],
            2,
            "cannot read the option 'a red circle'; options are written key=value, and special characters in a value "
            "need quotes inside quotes: 'key=\"value, more\"'",
        ),
        (["stage=dvae", "candidates=0"], 1, "candidates must be >= 1, got 0"),
        (
            ["stage=dvae", "--candidates=0"],
            2,
            "options are written without dashes, as candidates=0, got '--candidates=0'",
        ),
    ],
)
def test_mistake_is_one_line_and_a_code(
    config_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    expected: str,
) -> None:
    before = dict(os.environ)
    with pytest.raises(SystemExit) as raised:
        _run(config_dir, monkeypatch, *arguments)
    assert raised.value.code == code
    captured = capsys.readouterr()
    assert captured.err == f"error: {expected}\n"
    assert captured.out == ""
    assert dict(os.environ) == before


def test_failed_job_of_a_sweep_does_not_stop_the_others(
    config_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def task(cfg: DictConfig) -> None:
        seen.append(cfg.candidates)
        if cfg.candidates == 0:
            raise ValueError("candidates must be >= 1, got 0")

    monkeypatch.setattr(sys, "argv", ["app.py", "-m", "stage=dvae", "candidates=1,0,2"])
    with pytest.raises(SystemExit) as raised:
        run_script(task, config_dir=config_dir, config_name="app")
    assert raised.value.code == 1
    assert seen == [1, 0, 2]
    assert capsys.readouterr().err.endswith("\nerror: candidates must be >= 1, got 0\n")


def test_children_of_a_script_do_not_inherit_full_errors(config_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from dalle1.cli import errors_in_one_line\nwith errors_in_one_line(): raise ValueError('x')"
    outputs: list[str] = []

    def task(cfg: DictConfig) -> None:
        outputs.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr)

    monkeypatch.setattr(sys, "argv", ["app.py", "stage=dvae"])
    run_script(task, config_dir=config_dir, config_name="app")
    assert outputs == ["error: x\n"]


def test_command_line_needs_no_torch() -> None:
    code = "import sys, dalle1.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_named_options_get_dashes_and_all_else_stays() -> None:
    arguments = ["a.jpg", "out=x", "--out=y", "ckpt=a=b", "side=", "a b=1.jpg", "out"]
    expected = ["a.jpg", "--out=x", "--out=y", "--ckpt=a=b", "--side=", "a b=1.jpg", "out"]
    assert dashed_options(arguments, ("out", "ckpt", "side")) == expected


def test_option_that_does_not_exist_is_no_file() -> None:
    with pytest.raises(OptionError, match="there is no option 'limit'; there are out, side"):
        dashed_options(["a.jpg", "limit=20"], ("out", "side"))


def test_file_that_looks_like_an_option_stays_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out=1.png").touch()
    assert dashed_options(["out=1.png", "out=2"], ("out",)) == ["out=1.png", "--out=2"]
    (tmp_path / "seed=1").mkdir()
    (tmp_path / "seed=1" / "a.png").touch()
    assert dashed_options(["seed=1/*.png"], ("out",)) == ["seed=1/*.png"]
