"""How good a system is."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""


def run(options: argparse.Namespace) -> None:
    """Do it."""
