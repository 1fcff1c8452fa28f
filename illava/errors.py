"""Errors of the model side. Each message says what, where, why and what to do next.

Knows nothing of storage, rows or Ray: the pipeline maps these onto its closed list of row error types.
"""

from __future__ import annotations

# As the device's allocator, its libraries and the host's allocator say it.
_OUT_OF_MEMORY_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
_CAPTURE_SIGN = "captur"  # stands in the words of every cudaErrorStreamCapture*


class ILLaVAError(Exception):
    """Base of every error this package raises on purpose."""


class PlanError(ILLaVAError, ValueError):
    """A reduction plan that cannot be carried out: unknown stage, layer out of range, reducer at the wrong place."""


class ReductionDidNotFireError(ILLaVAError, RuntimeError):
    """A configured reduction step removed nothing at run time. Never a slow success."""


class RequestError(ILLaVAError, ValueError):
    """A request this model cannot answer: no media where one is needed, prompt too long, placeholder in the text."""


class PreprocessError(ILLaVAError, ValueError):
    """Frames that cannot be brought to model size: wrong dtype, shape or an empty list."""


class ModelLoadError(ILLaVAError, RuntimeError):
    """Weights or configuration that cannot be loaded: not safetensors, unknown family, missing file."""


class DeviceError(ILLaVAError, ValueError):
    """A device that is not known, or that this process does not have."""


class RandomWeightsError(ILLaVAError, ValueError):
    """Quality was asked of a model whose folder declares random weights: they are for speed and say nothing else."""


class RequestTooLargeError(RequestError):
    """One request needs more key/value pages than the whole pool has."""


class NumericalError(ILLaVAError, ArithmeticError):
    """Logits that are not finite. Carries the request so that its neighbours can go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host had no memory left; by name, since torch is not loaded here.

    Where memory runs out while a CUDA graph is captured, ending the capture fails as well. Its RuntimeError names the
    capture alone; the error that it follows tells why.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if not isinstance(error, RuntimeError):
        return False
    text, cause = str(error), error.__cause__ or error.__context__
    if any(sign in text for sign in _OUT_OF_MEMORY_SIGNS):
        return True
    return _CAPTURE_SIGN in text and cause is not None and is_out_of_memory(cause)
