"""How good a model is: `python -m dalle1.evaluate tokenizer|transformer|system|overlap ... [out=DIR]`.

Each command says with `--help` what it measures; docs/evaluation.md says what the numbers mean. Under
`torchrun --nproc-per-node=N -m dalle1.evaluate ...` the processes share the work, and the numbers are the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from dalle1.cli import dashed_options, errors_in_one_line
from dalle1.evaluation import overlap_command, system_command, tokenizer_command, transformer_command


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command, which its module describes: the docstring, `add_arguments(parser)` and `run(options)`."""

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


COMMANDS = {
    "tokenizer": Command(
        description=tokenizer_command.__doc__ or "",
        add_arguments=tokenizer_command.add_arguments,
        run=tokenizer_command.run,
    ),
    "transformer": Command(
        description=transformer_command.__doc__ or "",
        add_arguments=transformer_command.add_arguments,
        run=transformer_command.run,
    ),
    "system": Command(
        description=system_command.__doc__ or "",
        add_arguments=system_command.add_arguments,
        run=system_command.run,
    ),
    "overlap": Command(
        description=overlap_command.__doc__ or "",
        add_arguments=overlap_command.add_arguments,
        run=overlap_command.run,
    ),
}


@errors_in_one_line()
def main() -> None:
    """Command line of all evaluations."""
    parser = argparse.ArgumentParser(
        prog="python -m dalle1.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name,
            help=command.description.partition("\n")[0],
            description=command.description,
            epilog="Options may also be written without dashes: out=DIR.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parsers[name])
    arguments = sys.argv[1:]
    if arguments and arguments[0] in parsers:
        names = [flag.removeprefix("--") for flag in parsers[arguments[0]]._option_string_actions if flag[:2] == "--"]
        arguments = [arguments[0], *dashed_options(arguments[1:], names)]
    options = parser.parse_args(arguments)
    COMMANDS[options.command].run(options)


if __name__ == "__main__":
    main()
