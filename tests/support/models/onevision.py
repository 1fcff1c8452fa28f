"""Tiny random-weight LLaVA-OneVision folders in the Hugging Face format, for tests. Says nothing about quality.

Weights are scaled so that attention is far from uniform and greedy choices have a margin.
"""

from __future__ import annotations

import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}<video>"
    "{% else %}\n{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<image>", "<video>", "<pad>")


def make_onevision(
    folder: str | Path,
    *,
    side: int = 56,
    patch: int = 8,
    vision: dict | None = None,
    text: dict | None = None,
    max_tiles: int = 9,
    seed: int = 0,
) -> Path:
    """Write a model folder: config, tokenizer, chat template, processors, generation config, safetensors.

    The default grid is 7 x 7 = 49 patches: four cuts of 6 leave the square 25 (pooled: 16 and 9 a frame). For an even
    grid give ``side=64``: 64 patches, four cuts of 7 leave 36 (pooled: 16 and 9).

    Args:
        side: tile side in px.
        patch: patch side in px.
        vision: overrides of the SigLIP config (8 layers of width 32, 2 heads).
        text: overrides of the Qwen2 config (4 layers of width 32, 4 query and 2 key heads).
        max_tiles: N of ``anyres_max_N``; the canvases are always 1..3 x 1..3 tiles.
        seed: of the weights.
    """
    import torch
    from transformers import GenerationConfig, LlavaOnevisionForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = _config(tokenizer, side=side, patch=patch, vision=vision or {}, text=text or {}, max_tiles=max_tiles)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
        _scale_weights(model)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)
    _write_processors(folder, config, side, patch)
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL),
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(tokenizer, *, side: int, patch: int, vision: dict, text: dict, max_tiles: int):
    from transformers import LlavaOnevisionConfig

    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
        "vision_use_head": False,
    }
    text_config = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_config |= text
    return LlavaOnevisionConfig(
        vision_config=vision_config | vision,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio=f"anyres_max_{max_tiles}",
        image_grid_pinpoints=[[side * rows, side * cols] for rows in (1, 2, 3) for cols in (1, 2, 3)],
        tie_word_embeddings=text_config["tie_word_embeddings"],
    )


def _scale_weights(model) -> None:
    """Draw every parameter anew: matrices at 1.4 / sqrt(fan in), vectors around 1 (norms) or 0 (biases)."""
    import torch

    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() >= 2:
                std = 1.0 if "embed" in name and value.dim() == 2 else 1.4 / value[0].numel() ** 0.5
                value.normal_(0.0, std)
            elif "norm" in name and name.endswith("weight"):
                value.normal_(1.0, 0.1)
            else:
                value.normal_(0.0, 1.0 if "newline" in name else 0.1)


def _write_processors(folder: Path, config, side: int, patch: int) -> None:
    both = {
        "processor_class": "LlavaOnevisionProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "do_pad": True,
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (side // patch) ** 2,
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }
    for name, content in {
        "preprocessor_config.json": both | image,
        "video_preprocessor_config.json": both | {"video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor_config.json": processor,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2))
