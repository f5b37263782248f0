"""Freed memory stays with the process where glibc can be told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Takes 64 MB and frees them, three times; prints how many pages the last time touched for the first time.
TOUCH = """
import resource, sys
from dalle1.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * (64 << 20)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_used_again() -> None:
    pages = {}
    for mode in ("keep", "default"):
        result = subprocess.run([sys.executable, "-c", TOUCH, mode], capture_output=True, text=True, check=True)
        pages[mode] = int(result.stdout)
    assert pages["keep"] < 100
    assert pages["default"] > 1000, "the default has changed: is keep_freed_memory still needed?"


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dalle1.training import allocator

    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False
