"""How good a model is: `python -m dalle1.evaluate tokenizer|transformer|system|overlap ... [out=DIR]`.

Each command says with `--help` what it measures; docs/evaluation.md says what the numbers mean. Under
`torchrun --nproc-per-node=N -m dalle1.evaluate ...` the processes share the work, and the numbers are the same.
"""

from __future__ import annotations

import argparse
import sys

from dalle1.cli import dashed_options, errors_in_one_line
from dalle1.evaluation import overlap_command, system_command, tokenizer_command, transformer_command

# Each module describes its command: by its docstring, `add_arguments(parser)` and `run(options)`.
COMMANDS = {
    "tokenizer": tokenizer_command,
    "transformer": transformer_command,
    "system": system_command,
    "overlap": overlap_command,
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
        description = command.__doc__ or ""
        parsers[name] = commands.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
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
