"""Sets up logging for a command: lines of words on stderr, in colour on a terminal, or one JSON object a line.

Only commands and actors call it: importing and using the packages configures nothing. Works in a Python where nothing
is installed, so it imports the standard library alone, and rich where stderr is a terminal.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from typing import Any, NamedTuple

from pipeline.redaction import visible

STYLES = ("auto", "plain", "json")
_stray = logging.getLogger("stderr")
_OWN = ("illava", "pipeline", "stderr")
_FLAG = re.compile(r"--log?(?:=(.*))?")  # as argparse takes it, abbreviated too


class LogSettings(NamedTuple):
    """What an actor needs to log as its driver does.

    Attributes:
        style: one of `STYLES`.
        level: the least level of the project's own lines.
        fields: what stands in every JSON line.
    """

    style: str
    level: int
    fields: dict[str, str]


def asked_style(arguments: Sequence[str]) -> str:
    """Return the value of ``--log`` before the command line is parsed, so that its errors are told in that style."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        if found := _FLAG.fullmatch(flag):
            style = found[1] if found[1] is not None else value
            return style if style in STYLES else "auto"
    return "auto"


@contextmanager
def log_to_stderr(style: str = "auto", *, debug: bool = False) -> Iterator[None]:
    """Write what is logged to stderr while a command runs; at its end, logging is as it was.

    Lines of other libraries are shown from level WARNING, the project's own from INFO.

    Args:
        style: ``json``: one object a line, also of what libraries write to ``sys.stderr``. ``plain``: words.
            ``auto``: words, on a terminal coloured and with time and level.
        debug: show the project's lines of level DEBUG, too.
    """
    root, own = logging.getLogger(), [logging.getLogger(name) for name in _OWN]
    handler, levels = _handler(style), [logger.level for logger in own]
    root.addHandler(handler)
    for logger in own:
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.captureWarnings(style == "json")
    try:
        with _StrayLines() if style == "json" else nullcontext():
            yield
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(own, levels, strict=True):
            logger.setLevel(level)
        root.removeHandler(handler)


def log_settings() -> LogSettings | None:
    """Return what this process's actors shall log like; None where no command has set logging up."""
    words = _formatter()
    if words is None:
        return None
    style, fields = ("json", words.fields) if isinstance(words, JsonFormatter) else ("plain", {})
    return LogSettings(style, logging.getLogger(_OWN[0]).level, dict(fields))


def log_like(settings: LogSettings | None) -> None:
    """Set up logging in an actor's own process, for as long as it lives."""
    if settings is None:
        return
    logging.getLogger().addHandler(_handler(settings.style))
    for name in _OWN:
        logging.getLogger(name).setLevel(settings.level)
    logging.captureWarnings(settings.style == "json")
    if settings.style == "json":
        sys.stderr = _StrayLines()
    add_log_fields(**settings.fields)


def add_log_fields(**fields: str) -> None:
    """Put fields, such as the run's address, into every further JSON line of this command."""
    words = _formatter()
    if isinstance(words, JsonFormatter):
        words.fields.update({name: visible(value) for name, value in fields.items()})


class PlainFormatter(logging.Formatter):
    """Gives the words alone; in front of an own error "error: ", and its traceback above it."""

    def format(self, record: logging.LogRecord) -> str:
        is_error = record.levelno >= logging.ERROR and record.name.split(".")[0] in _OWN
        text = ("error: " if is_error else "") + record.getMessage()
        trace = [self.formatException(record.exc_info)] if record.exc_info else []
        return visible("\n".join([*trace, text]))


class TerminalFormatter(PlainFormatter):
    """Gives the words alone: the level stands in a column of its own."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).removeprefix("error: ")


class JsonFormatter(logging.Formatter):
    """Gives one JSON object: time (UTC), level, logger, message, the fields of the command, and a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)  # noqa: UP017 (UTC needs Python 3.11)
        entry = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": visible(record.getMessage()),
            **self.fields,
        }
        if record.exc_info:
            entry["traceback"] = visible(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


class _StrayLines(io.TextIOBase):
    """Stands for ``sys.stderr`` while JSON lines are written: what a library writes there is logged line by line.

    It is no terminal, so no progress bar is drawn; of one that is drawn all the same, its last state is a line. Passes
    everything on once it no longer stands there.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self._stderr, self._begun, self._lock, self._ended = sys.stderr, "", threading.Lock(), False

    def __enter__(self) -> _StrayLines:
        sys.stderr = self
        return self

    def __exit__(self, *_: object) -> None:
        self.write("\n")
        self._ended = True
        if sys.stderr is self:
            sys.stderr = self._stderr

    def write(self, text: str) -> int:
        if self._ended:
            return self._stderr.write(text)
        with self._lock:  # and not while it is logged, which takes locks of its own
            *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if said := line.rstrip().rpartition("\r")[2]:
                _stray.info("%s", visible(said))
        return len(text)

    def fileno(self) -> int:
        return self._stderr.fileno()

    @property
    def buffer(self) -> Any:
        """For bytes, which pass."""
        return self._stderr.buffer


class _JsonHandler(logging.StreamHandler):
    """Writes JSON lines. Once stderr is gone there is nowhere to say so, least of all on stderr."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            super().handleError(record)


class _PlainHandler(logging.StreamHandler):
    """Writes words alone, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with _bar_wiped():
            super().emit(record)


def _bar_wiped() -> AbstractContextManager[Any]:
    """While a line is written, tqdm's bar is gone; afterwards it stands below the line."""
    loaded = sys.modules.get("tqdm")
    return loaded.tqdm.external_write_mode(file=sys.stderr) if loaded else nullcontext()


def _formatter() -> PlainFormatter | JsonFormatter | None:
    """The formatter of this process's command; None where none has set logging up."""
    found = [handler.formatter for handler in logging.getLogger().handlers]
    return next((one for one in reversed(found) if isinstance(one, (PlainFormatter, JsonFormatter))), None)


def _handler(style: str) -> logging.Handler:
    handler = _terminal_handler() if style == "auto" and sys.stderr.isatty() else None
    if handler is None:
        handler = _JsonHandler() if style == "json" else _PlainHandler()
        handler.setFormatter(JsonFormatter() if style == "json" else PlainFormatter())
    return handler


def _terminal_handler() -> logging.Handler | None:
    """Colours, times and levels. None in a Python without rich, where a command only ends by saying what is missing."""
    try:
        from rich.console import Console
        from rich.logging import RichHandler
        from rich.text import Text
    except ImportError:
        return None

    class TerminalHandler(RichHandler):
        """Breaks no line at the terminal's width, so that commands can be copied."""

        def render(self, *, record: logging.LogRecord, traceback: object, message_renderable: Any) -> Text:
            time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S ")
            return Text.assemble((time, "log.time"), self.get_level_text(record), " ", message_renderable)

        def emit(self, record: logging.LogRecord) -> None:
            with _bar_wiped():
                super().emit(record)

    handler = TerminalHandler(console=Console(stderr=True, soft_wrap=True))
    handler.setFormatter(TerminalFormatter())
    return handler
