"""Keeps, dequantises or makes quantised weights while a model is loaded, and says what its decoder computes with.

Stored schemes are read by transformers' quantizers. On load torchao quantises the decoder's linear layers alone: tower,
projector and output head keep the model's dtype, as published recipes have it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from illava.checkpoint_check import StoredScheme
from illava.decoder.onednn_linears import is_plain
from illava.errors import ModelLoadError
from illava.families.extras import require_packages
from illava.weight_files import INT4_GROUP, Quantization, has_experts, is_quantised_on_load

_FP8_CAPABILITY = (8, 9)
# Where it is installed transformers imports it with every model, and it warns of extensions for other builds of torch.
logging.getLogger("torchao").setLevel(logging.ERROR)
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def computes_float8(device: torch.device | str) -> bool:
    """Whether a device multiplies float8 by float8: CUDA of compute capability 8.9 and later."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def keeps_stored(scheme: StoredScheme, config: Mapping[str, Any], device: torch.device | str) -> bool:
    """Whether weights stay as they are stored: the device has a product for them, and the scheme means that product.

    Experts are read by products of our own, and dequantised. Scales of blocks are for kernels that the package
    ``kernels`` fetches from the hub: who installs it, wants them.
    """
    if scheme.weights != "float8" or not scheme.quantizes_inputs or not computes_float8(device):
        return False
    if has_experts(config):
        return False
    return find_spec("kernels") is not None if scheme.method == "fp8" else scheme.has_common_product


def stored_options(config: Any, scheme: StoredScheme, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` is given to read a quantised checkpoint: straight to the device, so that no copy stands.

    Raises:
        ModelLoadError: a package of the extra ``quantized`` is missing.
    """
    require_packages("quantized", *scheme.packages, purpose=f"a checkpoint in {scheme}")
    keeps = keeps_stored(scheme, config.to_dict(), device)
    fields = {"dequantize": not keeps}
    if scheme.method == "compressed-tensors":
        fields["use_optimized_inference"] = keeps
    config.quantization_config = {**config.quantization_config, **fields}
    return {"config": config, "device_map": {"": torch.device(device)}}


def holds_encoded(module: nn.Module) -> bool:
    """Whether weights of this very module mean something with a scale only: its dtypes are its own, never cast."""
    return not all(type(p) is nn.Parameter and p.dtype in _PLAIN_DTYPES for p in module.parameters(recurse=False))


class OnLoad:
    """Quantises single linear layers of a decoder by torchao, each as soon as it stands on its device.

    Args:
        scheme: which, not ``none``.
        dtype: of the model.
        device: of the model.

    Raises:
        ModelLoadError: torchao is missing, or the scheme has no product for this dtype there.
    """

    def __init__(self, scheme: Quantization, *, dtype: torch.dtype, device: torch.device | str) -> None:
        require_packages("quantized", "torchao", purpose=f"model.quantization {scheme}")
        on_cuda = torch.device(device).type == "cuda"
        if scheme == "int4" and on_cuda and dtype != torch.bfloat16:
            raise ModelLoadError(
                f"model.quantization int4 computes in bfloat16 on CUDA, not in {dtype}: set model.dtype"
            )
        self._scheme, self._config = scheme, _torchao_config(scheme, dtype=dtype, device=device)

    def quantize(self, name: str, layer: Any) -> None:
        """Quantise one layer in place, if it is one of those that are.

        Raises:
            ModelLoadError: its width does not divide into groups.
        """
        if not is_plain(layer) or not is_quantised_on_load(f"{name.removesuffix('.base_layer')}.weight"):
            return
        if self._scheme == "int4" and layer.in_features % INT4_GROUP:
            raise ModelLoadError(
                f"model.quantization int4 shares a scale among {INT4_GROUP} inputs, and {name} has "
                f"{layer.in_features}: take int8 or float8"
            )
        from torchao.quantization import quantize_

        quantize_(layer, self._config)


def _torchao_config(scheme: Quantization, *, dtype: torch.dtype, device: torch.device | str) -> Any:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        PerRow,
    )
    from torchao.quantization.quant_primitives import MappingType

    if scheme == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "float8" and computes_float8(device) and dtype == torch.bfloat16:
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    if scheme == "float8":
        return Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    if torch.device(device).type == "cuda":
        return Int4WeightOnlyConfig(
            group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    # The same grid in one byte a number, computed in the model's dtype: torchao packs int4 for CUDA alone.
    return IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(INT4_GROUP),
        mapping_type=MappingType.ASYMMETRIC,
    )


def describe_weights(layer: Any, *, stored_as: str | None, quantization: Quantization) -> str:
    """Say what a decoder's linear layer computes with, such as ``bfloat16, dequantized from float8 (fp8)``."""
    base = getattr(layer, "base_layer", layer)
    dtype = str(base.weight.dtype).removeprefix("torch.")
    if quantization != "none":
        inputs_too = getattr(base.weight, "act_quant_kwargs", None) is not None
        return f"{quantization} by torchao, computed in {'float8' if inputs_too else dtype}"
    if stored_as is None:
        return dtype
    return f"{stored_as}, as stored" if holds_encoded(base) else f"{dtype}, dequantized from {stored_as}"
