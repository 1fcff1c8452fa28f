"""Defines the errors of the model side. Each message says what, where, why and what to do next.

Knows nothing of storage, rows or Ray: the pipeline maps these errors onto its closed list of row error types.
"""

from __future__ import annotations

# As the device's allocator, its libraries and the host's allocator say it.
_OUT_OF_MEMORY_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
_CAPTURE_SIGN = "captur"  # in the message of every cudaErrorStreamCapture*


class ILLaVAError(Exception):
    """Base of every error this package raises on purpose."""


class PlanError(ILLaVAError, ValueError):
    """A reduction plan cannot be carried out: unknown stage, layer out of range, reducer at the wrong stage."""


class ReductionDidNotFireError(ILLaVAError, RuntimeError):
    """A configured reduction step was a no-op at run time: it removed nothing, so the request was not reduced."""


class RequestError(ILLaVAError, ValueError):
    """A request cannot be answered by this model: media missing, prompt too long, placeholder in the text."""


class PreprocessError(ILLaVAError, ValueError):
    """Frames cannot be brought to model size: wrong dtype, wrong shape or an empty list."""


class ModelLoadError(ILLaVAError, RuntimeError):
    """Weights or configuration cannot be loaded: not safetensors, unknown family, missing file."""


class DeviceError(ILLaVAError, ValueError):
    """A device is unknown, or this process does not have it."""


class RandomWeightsError(ILLaVAError, ValueError):
    """Quality was to be measured on a model whose folder declares random weights; those are for speed alone."""


class RequestTooLargeError(RequestError):
    """One request needs more positions than the model has, with its media and its answer."""


class CacheTooSmallError(RequestTooLargeError):
    """One request needs more key/value blocks than the whole pool has; a larger pool would take it."""


class NumericalError(ILLaVAError, ArithmeticError):
    """The logits of one request are not finite; the other requests of its batch go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host ran out of memory; by name, since torch is not loaded here.

    When memory runs out while a CUDA graph is captured, ending the capture fails as well. That RuntimeError names the
    capture alone; its cause or context is the error that tells why.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if not isinstance(error, RuntimeError):
        return False
    text, cause = str(error), error.__cause__ or error.__context__
    if any(sign in text for sign in _OUT_OF_MEMORY_SIGNS):
        return True
    return _CAPTURE_SIGN in text and cause is not None and is_out_of_memory(cause)
