"""The real argument parser of any command of this repository, taken at the moment the command would parse.

A script is run as `python SCRIPT` runs it, up to its `parse_args`: whatever flags it has are the flags that are shown
and checked. Nothing behind that line runs.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


class _Caught(BaseException):
    """Carries the parser out; no `except Exception` may stop it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def _caught(run: Callable[[], object]) -> argparse.ArgumentParser:
    def parse_args(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Caught(parser)

    with mock.patch.multiple(argparse.ArgumentParser, parse_args=parse_args, parse_known_args=parse_args):
        try:
            run()
        except _Caught as caught:
            return caught.parser
    raise SystemExit("the command ended without parsing its arguments")


def parser_of_script(path: str) -> argparse.ArgumentParser:
    """Of a script, such as jobs/caption_videos.py."""
    search = list(sys.path)
    try:
        return _caught(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"))
    finally:
        sys.path[:] = search


def parser_of_module(name: str) -> argparse.ArgumentParser:
    """Of a module that is run by `python -m`, such as pipeline."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules after import")
        return _caught(lambda: runpy.run_module(name, run_name="__main__", alter_sys=False))
