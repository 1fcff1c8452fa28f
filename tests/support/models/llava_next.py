"""Tiny random-weight LLaVA-NeXT folders in the Hugging Face format, for tests. Says nothing about quality."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.models.onevision import _scale_weights, _tokenizer

# Written after the chat formats of the three kinds of published checkpoints. The first two put all images first.
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{{ '[INST] ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% endfor %}"
)
IN_ORDER = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DECODERS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
}


def make_llava_next(
    folder: str | Path,
    *,
    side: int = 48,
    patch: int = 8,
    decoder: str = "llama",
    template: str = IN_ORDER,
    vision: dict | None = None,
    text: dict | None = None,
    seed: int = 0,
) -> Path:
    """Write a model folder: config, tokenizer, chat template, processor, generation config, safetensors.

    The default grid is 6 x 6 = 36 patches and CLS; the tower has 8 blocks, of which 7 are run.

    Args:
        folder: is created.
        side: tile side in px; the canvases are those of the published checkpoints, in tiles.
        patch: patch side in px.
        decoder: one of `DECODERS`.
        template: the chat template.
        vision: overrides of the CLIP config (8 layers of width 32, 2 heads).
        text: overrides of the decoder's config (4 layers of width 32, 4 query heads).
        seed: of the weights.
    """
    import torch
    from transformers import GenerationConfig, LlavaNextForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = _config(tokenizer, side=side, patch=patch, vision=vision or {}, text=DECODERS[decoder] | (text or {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config).eval()
        _scale_weights(model)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)
    _write_processors(folder, config, side, patch)
    return folder


def _config(tokenizer, *, side: int, patch: int, vision: dict, text: dict):
    from transformers import LlavaNextConfig

    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
    }
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlavaNextConfig(
        vision_config=vision_config | vision,
        text_config=text_config | text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_grid_pinpoints=[[side * rows, side * cols] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
        image_seq_length=(side // patch) ** 2,
    )


def _write_processors(folder: Path, config, side: int, patch: int) -> None:
    image = {
        "processor_class": "LlavaNextProcessor",
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
        "do_pad": True,
    }
    processor = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    for name, content in {"preprocessor_config.json": image, "processor_config.json": processor}.items():
        (folder / name).write_text(json.dumps(content, indent=2))
