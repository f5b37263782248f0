"""Where the prompts of a run come from."""

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
    path = Path(prompts_file)
    if not path.is_file():
        raise FileNotFoundError(f"prompts_file must be a text file with one prompt per line, there is none at '{path}'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file must be UTF-8 text, '{path}' is not ({error.reason})") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompts_file must hold at least one prompt, '{path}' holds none")
    return prompts
