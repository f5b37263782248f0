"""Where the prompts and captions of a run come from."""

from pathlib import Path


def read_prompts(prompt: str | None, prompts_file: str | Path | None) -> list[str]:
    """The one prompt that is given, or all prompts of a file: one per line, blank lines skipped.

    Raises: ValueError unless exactly one source is given and a file holds prompts in UTF-8; FileNotFoundError if
        there is no such file.
    """
    if (prompt is None) == (prompts_file is None):
        raise ValueError(f"give either prompt=... or prompts_file=..., got {'neither' if prompt is None else 'both'}")
    if prompts_file is None:
        assert prompt is not None, "one of the two is given"
        return [prompt]
    return read_lines(prompts_file, option="prompts_file", each="prompt")


def read_lines(path: str | Path, *, option: str, each: str) -> list[str]:
    """The lines of a text file that are not blank, without white space around them.

    `option` and `each` name in messages where the path came from and what a line is.

    Raises: ValueError if it is not UTF-8 or holds nothing; FileNotFoundError if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{option} must be a text file with one {each} per line, there is none at '{path}'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} must be UTF-8 text, '{path}' is not ({error.reason})") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{option} must hold at least one {each}, '{path}' holds none")
    return lines
