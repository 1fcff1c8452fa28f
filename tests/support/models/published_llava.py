"""Weight names in the published LLaVA shards (llava-hf/*), as the tests of two families build them; JSON edits."""

from __future__ import annotations

import json

BOTH = ("weight", "bias")
BLOCK = [f"{x}.{end}" for x in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2") for end in BOTH]
BLOCK += [f"self_attn.{x}_proj.{end}" for x in ("q", "k", "v", "out") for end in BOTH]
LLM_LAYER = [f"self_attn.{x}_proj.weight" for x in "qkvo"] + [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
LLM_LAYER += ["input_layernorm.weight", "post_attention_layernorm.weight"]


def published_names(num_layers: int, num_blocks: int, *, tower: list[str], llm_layer: list[str]) -> set[str]:
    """Every name; ``tower``: those outside its blocks."""
    names = {"image_newline", "language_model.lm_head.weight"}
    names |= {f"multi_modal_projector.linear_{n}.{end}" for n in (1, 2) for end in BOTH}
    names |= {"language_model.model.embed_tokens.weight", "language_model.model.norm.weight"}
    names |= {f"language_model.model.layers.{n}.{x}" for n in range(num_layers) for x in llm_layer}
    names |= {f"vision_tower.vision_model.{x}" for x in tower}
    return names | {f"vision_tower.vision_model.encoder.layers.{n}.{x}" for n in range(num_blocks) for x in BLOCK}


def module_name(published: str, *, flat_tower: bool) -> str:
    """Where transformers puts a published weight."""
    if flat_tower:
        published = published.replace("vision_tower.vision_model.", "vision_tower.")
    name = published.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head") else f"model.{name}"


def edit(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
