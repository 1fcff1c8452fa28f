"""Defines the errors of the pipeline with their exit codes, and maps errors of the model side to row error types.

The closed list of row error types stands in `pipeline.records`.
"""

from __future__ import annotations

from illava.errors import (
    CacheTooSmallError,
    NumericalError,
    PreprocessError,
    ReductionDidNotFireError,
    RequestError,
    RequestTooLargeError,
    is_out_of_memory,
)
from pipeline.records import LoadStats, RowErrorType
from pipeline.redaction import redacted

_OF_MODEL_ERRORS: tuple[tuple[type[Exception], RowErrorType], ...] = (
    (CacheTooSmallError, "cache_too_small"),
    (RequestTooLargeError, "prompt_too_long"),
    (RequestError, "bad_request"),
    (PreprocessError, "bad_request"),
    (NumericalError, "numerical_error"),
    (ReductionDidNotFireError, "reduction_did_not_fire"),
)


class PipelineError(Exception):
    """Base. The message says what, where, why and the next command; `exit_code` is the process's."""

    exit_code: int = 5


class ConfigError(PipelineError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class MissingPackageError(PipelineError):
    """A package that the job needs is not installed; the message has the command that installs it."""

    exit_code = 2


class InputError(PipelineError):
    """The manifest or listing cannot be used: no items, duplicate ids, missing column."""

    exit_code = 2


class RefusedError(PipelineError):
    """The output belongs to another run, or verification failed."""

    exit_code = 4


class InterruptedRunError(PipelineError):
    """A signal ended a command that has no answer without its end; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class StorageError(PipelineError):
    """The store failed for the run as a whole (not for one object)."""


class CredentialsError(StorageError):
    """Credentials are missing or expired: the run stops instead of failing every item."""


class ClusterError(PipelineError):
    """Ray could not be started or reached, or its actors do not stay alive."""


class ItemError(PipelineError):
    """One item cannot be processed; becomes a failed row.

    Attributes:
        error_type: from the closed list.
        retryable: another attempt may succeed.
        stats: what was spent on it before it failed; None where nobody measured.
    """

    def __init__(self, error_type: RowErrorType, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.retryable = retryable
        self.stats: LoadStats | None = None

    def __reduce__(self) -> tuple:
        return _rebuild_item_error, (self.error_type, str(self), self.retryable)


def _rebuild_item_error(error_type: RowErrorType, message: str, retryable: bool) -> ItemError:
    return ItemError(error_type, message, retryable=retryable)


def classify(error: Exception) -> tuple[RowErrorType, str]:
    """Return the row error type of an error that ended one request, and what the row says."""
    for kind, error_type in _OF_MODEL_ERRORS:
        if isinstance(error, kind):
            return error_type, str(error) or type(error).__name__
    if is_out_of_memory(error):
        return "out_of_memory", str(error) or type(error).__name__
    return "internal_error", redacted(f"{type(error).__name__}: {error}")
