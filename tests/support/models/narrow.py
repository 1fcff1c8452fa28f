"""Fabricated checkpoints of the published models' depth, patches and pixel ranges, only narrower; random weights.

For tests of the shipped configurations: a preset's layers and counts are those of the real model.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.models import qwen as models_qwen
from tests.support.models.internvl import make_internvl
from tests.support.models.llava_next import VICUNA, make_llava_next
from tests.support.models.onevision import make_onevision
from tests.support.models.qwen3_5 import make_narrow_qwen3_5
from tests.support.models.qwen_moe import EXPERTS


def make_narrow(model_type: str, folder: str | Path) -> Path:
    """Write the folder of the size that `configs/` names: 7B or 8B; of mixtures of experts 30B."""
    if model_type == "llava_onevision":
        depth = {"vision": {"num_hidden_layers": 26}, "text": {"num_hidden_layers": 28}}
        return make_onevision(folder, side=384, patch=14, **depth)
    if model_type == "internvl":
        return make_narrow_internvl(folder)
    if model_type == "llava_next":
        depth = {"vision": {"num_hidden_layers": 24}, "text": {"num_hidden_layers": 32}}
        return make_llava_next(folder, side=336, patch=14, template=VICUNA, **depth)
    if model_type == "qwen3_5":
        return make_narrow_qwen3_5(folder)
    return _make_qwen(model_type, Path(folder))


def make_narrow_internvl(folder: str | Path, *, hidden: int = 32, intermediate: int = 64) -> Path:
    """Write a folder of the depth, tiles and patches of InternVL3.5-8B and -4B, which differ in these two widths."""
    text = {"model_type": "qwen3", "head_dim": 16, "max_position_embeddings": 40960}
    text |= {"hidden_size": hidden, "intermediate_size": intermediate}
    vision = {"num_hidden_layers": 24}
    return make_internvl(folder, side=448, patch=14, max_patches=12, vision=vision, text=text, num_layers=36)


_OLDER = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
_OLDER |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_QWEN3 = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# model_type: transformers' names, decoder layers, tower, files of the processors as published
_QWEN = {
    "qwen2_vl": (
        "Qwen2VL",
        28,
        {"depth": 32, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
        {"preprocessor_config.json": _OLDER},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        28,
        {
            "depth": 32,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        {"preprocessor_config.json": _OLDER},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        36,
        {
            "depth": 27,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        {
            "preprocessor_config.json": _QWEN3 | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}},
            "video_preprocessor_config.json": _QWEN3 | {"size": {"shortest_edge": 4096, "longest_edge": 25165824}},
        },
    ),
}
_QWEN["qwen3_vl_moe"] = ("Qwen3VLMoe", 48, *_QWEN["qwen3_vl"][2:])


def _make_qwen(model_type: str, folder: Path) -> Path:
    import transformers

    name, num_layers, vision, processors = _QWEN[model_type]
    tokenizer = models_qwen._tokenizer()
    vision |= {"num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    text = models_qwen._text(tokenizer, num_layers) | ({"head_dim": 16} if model_type.startswith("qwen3") else {})
    text |= EXPERTS if model_type == "qwen3_vl_moe" else {}
    text["max_position_embeddings"] = 32768
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(text_config=text, vision_config=vision, **models_qwen._tokens(tokenizer))
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    models_qwen._write(folder, tokenizer, model_class, config, name=name, seed=0)
    (folder / "video_preprocessor_config.json").unlink()
    for file, content in processors.items():
        (folder / file).write_text(json.dumps(content, indent=2))
    return folder
