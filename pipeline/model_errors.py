"""The model side's errors to the closed list of row error types."""

from __future__ import annotations

from illava.errors import (
    NumericalError,
    PreprocessError,
    ReductionDidNotFireError,
    RequestError,
    RequestTooLargeError,
)
from pipeline.fitting_batch import is_out_of_memory
from pipeline.records import RowErrorType
from pipeline.redaction import redacted

_ERROR_TYPES: tuple[tuple[type[Exception], RowErrorType], ...] = (
    (RequestTooLargeError, "prompt_too_long"),
    (RequestError, "bad_request"),
    (PreprocessError, "bad_request"),
    (NumericalError, "numerical_error"),
    (ReductionDidNotFireError, "reduction_did_not_fire"),
)


def classify(error: Exception) -> tuple[RowErrorType, str]:
    """The row error type of an error that ended one request, and what the row says."""
    for kind, error_type in _ERROR_TYPES:
        if isinstance(error, kind):
            return error_type, str(error) or type(error).__name__
    if is_out_of_memory(error):
        return "out_of_memory", str(error) or type(error).__name__
    return "internal_error", redacted(f"{type(error).__name__}: {error}")
