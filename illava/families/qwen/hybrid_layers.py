"""Reads from the JSON files which layers of a Qwen3.5 attend, and what the recurrent ones keep. Torch-free.

Source: transformers 5.23, models/qwen3_5/configuration_qwen3_5.py, whose defaults serve for keys that are left out.
"""

from __future__ import annotations

from illava.decoder.state_shape import StateShape
from illava.errors import ModelLoadError
from illava.families.hybrid_layers import HybridLayers
from illava.model_files import ModelFiles


def read_hybrid_layers(files: ModelFiles) -> HybridLayers:
    """Read kinds and sizes of the decoder's layers.

    Raises:
        ModelLoadError: a layer of another kind.
    """
    text = files.config.section("text_config")
    num_layers, interval = text["num_hidden_layers"], text.get("full_attention_interval", 4)
    kinds = text.get("layer_types") or [
        "linear_attention" if (n + 1) % interval else "full_attention" for n in range(num_layers)
    ]
    unknown = sorted({str(kind) for kind in kinds} - {"linear_attention", "full_attention"})
    if unknown:
        raise ModelLoadError(
            f"{text.where} has layer_types {', '.join(unknown)}; linear_attention and full_attention are built"
        )
    attend = tuple(n for n, kind in enumerate(kinds) if kind == "full_attention")
    num_recurrent = len(kinds) - len(attend)
    if not num_recurrent:
        return HybridLayers(attend)
    key_width, value_width = text.get("linear_key_head_dim", 128), text.get("linear_value_head_dim", 128)
    key_heads, value_heads = text.get("linear_num_key_heads", 16), text.get("linear_num_value_heads", 32)
    shape = StateShape(
        num_layers=num_recurrent,
        num_channels=2 * key_heads * key_width + value_heads * value_width,
        look_back=text.get("linear_conv_kernel_dim", 4) - 1,
        num_heads=value_heads,
        key_width=key_width,
        value_width=value_width,
    )
    return HybridLayers(attend, shape)
