"""Tiny random-weight InternVL folders in the Hugging Face format, for tests. Says nothing about quality.

Tiles of 32 px, patches of 4 px, groups of 8 px: 16 tokens a tile. An image is cut into 1 to 6 tiles, and a thumbnail.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% elif part['type'] == 'video' %}<video>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL = ("<|im_start|>", "<|im_end|>", *NAMED.values(), "<|endoftext|>")
# The published 38B and 78B have a tower of 6 billion parameters of this kind, the others one of 300 million.
LARGE_TOWER = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}


def make_internvl(
    folder: str | Path,
    *,
    side: int = 32,
    patch: int = 4,
    vision: dict | None = None,
    text: dict | None = None,
    num_layers: int = 4,
    max_patches: int = 6,
    seed: int = 0,
) -> Path:
    """Write a model folder: config, tokenizer, chat template, processors, generation config, safetensors.

    Args:
        side: tile side in px.
        patch: patch side in px.
        vision: overrides of the tower's config (6 layers of width 32, 2 heads).
        text: overrides of the Qwen2 config (width 32, 4 query and 2 key heads).
        num_layers: of the decoder.
        max_patches: tiles of an image at most, thumbnail apart.
        seed: of the weights.
    """
    import torch
    from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = InternVLConfig(
        vision_config=_vision(side, patch) | (vision or {}),
        text_config=_text(tokenizer, num_layers) | (text or {}),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(side // patch // 2) ** 2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config).eval()
        _scale_weights(model)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)
    _write_processors(folder, side, max_patches)
    return folder


def make_tokenizer() -> Any:
    """A byte-level tokenizer with the tokens that InternVL's processor asks for by name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMED,
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _vision(side: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": [side, side],
        "patch_size": [patch, patch],
    }


def _text(tokenizer: Any, num_layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _scale_weights(model: Any) -> None:
    """Draw every parameter anew: matrices at 1.4 / sqrt(fan in), norms and layer scales around 1, biases around 0."""
    import torch

    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() >= 2:
                embeds = "embed_tokens" in name or "cls_token" in name or "position_embeddings" in name
                value.normal_(0.0, 1.0 if embeds else 1.4 / value[0].numel() ** 0.5)
            elif "lambda" in name or ("norm" in name and name.endswith("weight")):
                value.normal_(1.0, 0.1)
            else:
                value.normal_(0.0, 0.1)


def _write_processors(folder: Path, side: int, max_patches: int) -> None:
    both = {
        "processor_class": "InternVLProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    image = {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False}
    for name, content in {
        "preprocessor_config.json": both | image | {"min_patches": 1, "max_patches": max_patches},
        "video_preprocessor_config.json": both | {"video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": (side // 8) ** 2,
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2))
