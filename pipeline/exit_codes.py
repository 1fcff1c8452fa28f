"""Ends a command: with its exit code, and with an error's words on stderr."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from illava.errors import ILLaVAError
from pipeline.errors import ItemError, PipelineError
from pipeline.known_errors import known_error
from pipeline.log import log_to_stderr
from pipeline.redaction import visible

logger = logging.getLogger(__name__)
_OLDEST_PYTHON = (3, 11)
EXIT_CODES = """\
exit codes: 0 all ok · 2 usage or configuration · 3 finished, with failed items · 4 refused (another run's output) ·
5 infrastructure · 6 stopped at its budget · 7 more items failed than runtime.max_failed allows · 130/143 interrupted;
after 6, 7, 130 and 143 the same command resumes"""


def guarded(command: Callable[[], int], *, debug: bool, log: str = "auto") -> int:
    """Run a command; its errors become words on stderr and an exit code, with a traceback only in debug mode.

    Args:
        command: returns the exit code.
        debug: show tracebacks.
        log: style of what is said on stderr, one of `pipeline.log.STYLES`.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the hub's library is first imported
    with log_to_stderr(log, debug=debug), terminated_as_interrupted():
        if sys.version_info < _OLDEST_PYTHON:
            version = sys.version.split()[0]
            logger.error("%s is Python %s; 3.11 or newer is needed", sys.executable, version)
            return 2
        try:
            exit_code = command()
            sys.stdout.flush()
            return exit_code
        except KeyboardInterrupt as interrupt:
            name = "SIGTERM" if isinstance(interrupt, Terminated) else "SIGINT"
            logger.warning("interrupted by %s; the same command resumes", name)
            return Terminated.exit_code if isinstance(interrupt, Terminated) else 130
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _reader_has_gone():
                return 128 + signal.SIGPIPE
            words, exit_code = _told(error, debug=debug)
            logger.error("%s", visible(words), exc_info=debug)  # whoever else handles it gets no secrets either
            return exit_code


def _reader_has_gone() -> bool:
    """Whether nobody reads stdout any more, such as `head`, which has what it wanted; then nothing is written there."""
    stdout = sys.__stdout__.fileno() if sys.__stdout__ is not None else -1
    watch = select.poll()
    watch.register(stdout, 0)  # a pipe that nobody reads is always told
    if not watch.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # for what the interpreter writes when it ends
    return True


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, which ends a command as Ctrl-C does."""

    exit_code = 143


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGTERM by raising."""
    raise Terminated


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """While a command runs, SIGTERM raises; else it would end the process without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _told(error: Exception, *, debug: bool) -> tuple[str, int]:
    """What is said of an error, and the exit code; only what nothing is known of is called a defect."""
    if isinstance(error, ItemError) and error.error_type == "unsafe_uri":
        return str(error), 2  # of the configuration or the command line: a manifest's are refused as InputError
    if isinstance(error, PipelineError):
        return str(error), error.exit_code
    if isinstance(error, ILLaVAError):
        return str(error), 2
    if known := known_error(error):
        return known
    hint = "" if debug else "; this is a defect: --debug shows where"
    return f"{type(error).__name__}: {error}{hint}", 5
