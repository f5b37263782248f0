"""What the command lines share: free text in options, options without dashes, and errors in one line.

Hydra's grammar gives a meaning to commas, quotes, brackets and more, so a prompt from the shell is quoted for it
here. Errors that a user, an option or a file can cause become one line on stderr and an exit code: 2 for the
command line and the configuration, 1 for all else, 130 for Ctrl-C. DALLE1_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

MULTIRUN_FLAGS = ("-m", "--multirun")
_HYDRA_FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun"),
)


class OptionError(ValueError):
    """A mistake in the command line."""


_USAGE_ERRORS = (OptionError, HydraException, OmegaConfBaseException)
_EXPECTED_ERRORS = (*_USAGE_ERRORS, ValueError, TypeError, OSError)


def run_script(
    task: Callable[[DictConfig], Any],
    *,
    config_dir: Path,
    config_name: str,
    text_options: Collection[str] = (),
    path_options: Collection[str] = (),
) -> None:
    """Run a script's task with the configuration that its command line asks for; the whole of Hydra's CLI works.

    Args:
        task: The script's work.
        config_dir: Absolute path of the configuration directory.
        config_name: The script's configuration in it, without `.yaml`.
        text_options: Options whose value is any text, taken literally.
        path_options: Options whose value is a path; `${...}` in it is still resolved and `null` is still no path.

    Raises:
        SystemExit: For expected errors and Ctrl-C, see the module's docstring.
    """
    arguments = sys.argv[1:]
    with errors_in_one_line():
        sys.argv[1:] = quote_options(arguments, text_options=text_options, path_options=path_options)
        # In a sweep Hydra itself must see a failed job, to go on with the others.
        sweep = any(flag in arguments for flag in MULTIRUN_FLAGS)
        guarded = task if sweep else errors_in_one_line()(task)
        main = hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(guarded)
        with _hydra_raises():
            try:
                main()
            except ConfigCompositionException as error:
                unknown = re.match(r"Could not override '([^']+)'", str(error))
                if unknown is None:
                    raise
                raise _unknown_option(unknown[1], config_dir, config_name) from error


def quote_options(
    arguments: Sequence[str], *, text_options: Collection[str] = (), path_options: Collection[str] = ()
) -> list[str]:
    """Command-line arguments with the values of free-text options quoted as Hydra's grammar wants it.

    A value that is quoted already stays, and so does a sweep over values under `--multirun`. `[a,b]` is a list of
    paths: between commas they are literal too.

    Raises: OptionError for an option written `--name`, and for the text `???`, which Hydra cannot tell from a
        missing value.
    """
    sweep = any(flag in arguments for flag in MULTIRUN_FLAGS)
    quoted = []
    for argument in arguments:
        name, separator, value = argument.partition("=")
        key = name.lstrip("+")
        if name.startswith("--") and name not in _HYDRA_FLAGS:
            raise OptionError(f"options are written without dashes, as {name[2:]}={value or '...'}, got {argument!r}")
        is_free = separator and (key in text_options or (key in path_options and value != "null"))
        if not is_free or _is_quoted(value) or (sweep and _is_sweep(argument)):
            quoted.append(argument)
        elif value == "???":
            raise OptionError(f"{key} must not be '???', which stands for a missing value in configurations")
        else:
            quoted.append(f"{name}={_quote_text(value) if key in text_options else _quote_paths(value)}")
    return quoted


def _quote_text(text: str) -> str:
    """A text is taken literally: `${` in it refers to nothing."""
    return _quote(re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text))


def _quote_paths(value: str) -> str:
    """A path, or a list of paths in square brackets; it may refer to other options. `[0-9].tar` is a path.

    Mappings, such as `[{path:a.tar,weight:2},b.tar]`, are left to Hydra's grammar.
    """
    if re.match(r"[\[{].*?(?<!\w)['\"]?(path|weight)['\"]?\s*:", value):
        return value
    if value.startswith("[") and value.endswith("]"):
        # Not at the commas of braces: `{a,b}.tar` is one path.
        paths = [path.strip() for path in re.split(r",(?![^{}]*\})", value[1:-1])]
        return f"[{','.join(path if _is_quoted(path) else _quote(path) for path in paths)}]"
    return _quote(value)


def _quote(text: str) -> str:
    return str(QuotedString(text=text, quote=Quote.single).with_quotes())


def _is_quoted(value: str) -> bool:
    """Whether a value is one complete quoted string of Hydra's grammar."""
    override = _parse(f"any={value}")
    return override is not None and isinstance(override._value, QuotedString)


def _is_sweep(argument: str) -> bool:
    override = _parse(argument)
    return override is not None and override.is_sweep_override()


def _parse(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def dashed_options(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """Arguments for argparse, with the options `names` written `name=value`, as in Hydra's grammar, as `--name=value`.

    A file whose whole name looks like such an option stays a file, and so does a glob of files in `seed=1/`.

    Raises: OptionError for an option that is not among `names`."""
    options = []
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        is_option = separator and re.fullmatch("[a-z_]+", name) and not os.path.lexists(argument)
        if is_option and name not in names and not glob.glob(argument, recursive=True):
            raise OptionError(f"there is no option '{name}'; there are {', '.join(names)}")
        options.append(f"--{argument}" if is_option and name in names else argument)
    return options


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn expected errors and Ctrl-C into one line on stderr and an exit code; also usable as a decorator.

    Expected are errors that users, options or files can cause: ValueError, TypeError, OSError, and those of Hydra
    and OmegaConf. All others pass, and with DALLE1_DEBUG=1 or HYDRA_FULL_ERROR=1 these do too.

    Raises: SystemExit with 2 for a wrong command line or configuration, 1 for other errors, 130 for Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Who reads the output has seen enough, as `| head` does; nothing more can be written at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        message = describe(error)
        if message is None or _wants_traceback():
            raise
        print(f"error{_on_rank()}: {message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, _USAGE_ERRORS) else 1) from error


def _on_rank() -> str:
    """Which of several processes this is, but for the first one: the same mistake is said by all of them."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    rank = next((os.environ[name] for name in names if name in os.environ), "0")
    return "" if rank == "0" else f" on rank {rank}"


def describe(error: BaseException) -> str | None:
    """One line for an expected error; None if it is not one, so that its traceback is needed."""
    if isinstance(error, InstantiationException):
        return _describe_instantiation(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read the option {error.override!r}; options are written key=value, and {_QUOTING_HINT}"
    if isinstance(error, CompactHydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return f"{_in_one_line(str(error))}: {_in_one_line(str(error.__cause__))}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given, as {error.full_key}=..."
    if isinstance(error, _EXPECTED_ERRORS):
        return _in_one_line(str(error)) or type(error).__name__
    return None


_QUOTING_HINT = "special characters in a value need quotes inside quotes: 'key=\"value, more\"'"


def _describe_instantiation(error: InstantiationException) -> str | None:
    """The error that an object's constructor raised, and where in the configuration it stands."""
    place = re.search(r"full_key: (\S+)", str(error))
    cause: BaseException | None = error.__cause__
    while isinstance(cause, InstantiationException):
        cause = cause.__cause__
    message = describe(cause) if cause else _in_one_line(str(error))
    return f"{message} (in the configuration at '{place[1]}')" if message and place else message


def _in_one_line(message: str) -> str:
    """A message of several lines as one; indented lines become a list, Hydra's search path is left out."""
    if message.startswith("Caught ") and " in DataLoader worker process" in message:
        # PyTorch wraps a worker's error into its whole traceback; the last line is what was raised.
        message = message.rstrip().splitlines()[-1].partition(": ")[2]
    line = ""
    for part in message.split("Config search path:")[0].splitlines():
        if part.strip():
            separator = ", " if part[0].isspace() else "; "
            line += (" " if line.endswith((":", ".", ";", ",")) else separator if line else "") + part.strip()
    return line


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let `hydra.main` raise what it would print, without asking child processes for tracebacks."""
    changed = {"DALLE1_DEBUG": "1" if _wants_traceback() else "0", "HYDRA_FULL_ERROR": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wants_traceback() -> bool:
    return os.environ.get("DALLE1_DEBUG", os.environ.get("HYDRA_FULL_ERROR")) == "1"


def _unknown_option(name: str, config_dir: Path, config_name: str) -> OptionError:
    """The error for an option that does not exist, with the most similar one that does."""
    # A bare name is compared with the last part of dotted ones, so that `lr` finds `optim.lr`.
    options = {
        option if "." in name else option.rpartition(".")[2]: option
        for option in reversed(_options(config_dir, config_name, without=name))
    }
    nearest = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean '{options[nearest[0]]}'?" if nearest else "--help lists the options"
    return OptionError(f"there is no option '{name}'; {hint}")


def _options(config_dir: Path, config_name: str, *, without: str) -> list[str]:
    """Dotted names of all options, with the groups that the command line chooses if it is right otherwise."""
    chosen = [argument for argument in sys.argv[1:] if argument[0] != "-" and not argument.startswith(f"{without}=")]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir)):
        for overrides in (chosen, []):
            with suppress(HydraException):
                config = hydra.compose(config_name, overrides, return_hydra_config=True)
                names = [*config.hydra.runtime.choices, *_dotted_names(OmegaConf.to_container(config))]
                return [str(name) for name in names if not str(name).startswith("hydra")]
    return []


def _dotted_names(config: Any) -> Iterator[str]:
    """Names of all values in nested dicts, outer ones first."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield str(name)
            yield from (f"{name}.{inner}" for inner in _dotted_names(value))
