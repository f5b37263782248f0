"""docs/configuration.md says what conf/ and the code say: all options, with what Hydra makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from configuration_reference import PAGE, without_meaning, write_page
from configuration_source import CONF, describe, read_config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = CONF.parent
STAGES = sorted(path.stem for path in (CONF / "stage").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of all that is set, but for what names a class and Hydra's own."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{name}.")
        elif name != "_target_":
            found[f"{prefix}{name}"] = value
    return found


def composed(primary: str, *overrides: str) -> dict[str, Any]:
    return leaves(OmegaConf.to_container(compose(primary, list(overrides)), resolve=False))


def named_on_page() -> set[str]:
    return set(re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text("utf-8"), flags=re.MULTILINE))


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == write_page(), "python tools/configuration_reference.py writes it anew"


def test_every_option_says_what_it_means() -> None:
    assert without_meaning() == [], "write a comment beside each of them, in conf/ or at the field"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_page_has_every_option_of_training_as_hydra_composes_it(stage: str, experiment: str) -> None:
    options = composed("train", f"stage={stage}", f"experiment={experiment}")
    assert len(options) > 50
    assert options.keys() - named_on_page() == set()
    files = {"stage": stage, "data": experiment, "model": f"{stage}_{experiment}", "optim": f"{stage}_{experiment}"}
    for group, choice in files.items():
        path = CONF / group / f"{choice}.yaml"
        written = read_config(path).options if path.is_file() else {}
        assert {f"{group}.{name}": yaml.safe_load(option.values[choice]) for name, option in written.items()} == {
            name: value for name, value in options.items() if name.startswith(f"{group}.")
        }


def test_page_has_what_holds_where_an_experiment_says_nothing() -> None:
    row = next(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `truncate_captions` |"))
    assert composed("train", "stage=dvae")["truncate_captions"] is False
    assert "| else: `false`; cc3m_small, " in row


@pytest.mark.parametrize("choice", [path.stem for path in sorted((CONF / "trainer").glob("*.yaml"))])
def test_files_that_build_on_others_have_their_values(choice: str) -> None:
    expected = composed("train", "stage=dvae", f"trainer={choice}")
    assert {
        f"trainer.{name}": yaml.safe_load(option.values[choice])
        for name, option in read_config(CONF / "trainer" / f"{choice}.yaml").options.items()
    } == {name: value for name, value in expected.items() if name.startswith("trainer.")}


@pytest.mark.parametrize("primary", [path.stem for path in sorted(CONF.glob("*.yaml")) if path.stem != "train"])
def test_page_has_every_option_of_the_other_commands(primary: str) -> None:
    assert composed(primary).keys() - named_on_page() == set()


def test_types_and_comments_are_read_from_classes_and_their_bases() -> None:
    fields = describe("dalle1.training.dvae_module.DVAEOptimConfig")
    assert fields["max_steps"] == ("whole number", "length of the run")
    assert fields["lr_schedule"][0] == "`cosine` or `plateau`"
    assert fields["min_log_scale"][1].startswith("Floor on ln b of the likelihood")
    assert describe("dalle1.training.checkpoints.LastCheckpoint")["keep_every_n_steps"] == (
        "whole number or `null`",
        "Those after a multiple of so many updates stay for good; a multiple of `every_n_steps`.",
    )


def test_comments_of_yaml_are_those_beside_or_above_a_value(tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(
        "# About the file.\nfirst: 1\n# above,\n# in two lines\nsecond: '#'\nthird: [a, b]  # beside\n\n"
        "part:\n  # above\n  inner: null  # beside is nearer\nlast: 0.5\n"
    )
    config = read_config(path)
    assert config.header == "About the file."
    assert {name: option.meaning for name, option in config.options.items()} == {
        "first": "",
        "second": "above, in two lines",
        "third": "beside",
        "part.inner": "beside is nearer",
        "last": "",
    }
    assert [option.type for option in config.options.values()] == ["whole number", "text", "list", "", "number"]


def test_environment_variables_of_users_are_on_the_page() -> None:
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    # What one process of ours tells another is nobody's to set.
    names = set(re.findall(r"\bDALLE1_[A-Z_]+", source)) - {"DALLE1_JOB", "DALLE1_PARENT"}
    assert names
    assert {name for name in names if name not in PAGE.read_text("utf-8")} == set()
