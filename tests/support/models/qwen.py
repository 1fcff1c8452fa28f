"""Tiny random-weight Qwen-VL folders in the Hugging Face format, for tests. Says nothing about quality.

Patches of 4 px, groups of 8 px, two frames a temporal patch; images of 192 to 4096 px, video frames of 192 to 2048
(Qwen3-VL: all frames of a video of 192 to 16384).
"""

from __future__ import annotations

import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|endoftext|>",
)
PATCH_PX = 4
IMAGE_PIXELS, VIDEO_PIXELS, CLIP_PIXELS = (192, 4096), (192, 2048), (192, 16384)
MROPE_SECTION = [2, 3, 3]


def make_qwen2_vl(folder: str | Path, *, depth: int = 6, num_layers: int = 4, seed: int = 0) -> Path:
    """Write a Qwen2-VL folder: a tower of ``depth`` blocks (2 heads of 16), a decoder of ``num_layers`` (4 of 16)."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = _tokenizer()
    vision = {
        "depth": depth,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": PATCH_PX,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = Qwen2VLConfig(text_config=_text(tokenizer, num_layers), vision_config=vision, **_tokens(tokenizer))
    return _write(folder, tokenizer, Qwen2VLForConditionalGeneration, config, name="Qwen2VL", seed=seed)


def make_qwen2_5_vl(folder: str | Path, *, depth: int = 6, num_layers: int = 4, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL folder: as `make_qwen2_vl`; windows of 2 x 2 groups, full attention in blocks 1, 3 and 5."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer()
    vision = {
        "depth": depth,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": PATCH_PX,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 4 * PATCH_PX,
        "fullatt_block_indexes": [1, 3, 5],
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(text_config=_text(tokenizer, num_layers), vision_config=vision, **_tokens(tokenizer))
    return _write(folder, tokenizer, Qwen2_5_VLForConditionalGeneration, config, name="Qwen2_5_VL", seed=seed)


def make_qwen3_vl(folder: str | Path, *, depth: int = 6, num_layers: int = 4, seed: int = 1) -> Path:
    """Write a Qwen3-VL folder: as `make_qwen2_vl`; 5 x 5 learned positions, deepstack behind blocks 0, 2 and 4."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = _tokenizer()
    text = _text(tokenizer, num_layers) | {"head_dim": 16}
    config = Qwen3VLConfig(text_config=text, vision_config=_qwen3_vision(depth), **_tokens(tokenizer))
    return _write(folder, tokenizer, Qwen3VLForConditionalGeneration, config, name="Qwen3VL", seed=seed)


def _qwen3_vision(depth: int) -> dict:
    return {
        "depth": depth,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": PATCH_PX,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2, 4],
    }


def _text(tokenizer, num_layers: int) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE_SECTION},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _tokens(tokenizer) -> dict:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


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
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _write(folder: str | Path, tokenizer, model_class, config, *, name: str, seed: int) -> Path:
    import torch
    from transformers import GenerationConfig

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        _scale_weights(model)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)
    _write_processors(folder, name)
    return folder


def _scale_weights(model) -> None:
    """Draw every parameter anew: matrices at 1.4 / sqrt(fan in), vectors around 1 (norms) or 0 (biases)."""
    import torch

    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() >= 2:
                std = 1.0 if "embed_tokens" in name else 1.4 / value[0].numel() ** 0.5
                if ".experts." in name:  # small: of two experts that nearly tie, rounding may choose either
                    std = 0.5 / value.shape[-1] ** 0.5
                value.normal_(0.0, std)
            elif ("norm" in name or "ln_q" in name) and name.endswith("weight"):
                value.normal_(1.0, 0.1)
            else:
                value.normal_(0.0, 0.1)


def _write_processors(folder: Path, name: str) -> None:
    patches = {"patch_size": PATCH_PX, "merge_size": 2, "temporal_patch_size": 2}
    normal = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    image = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": f"{name}Processor"}
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": f"{name}Processor"}
    for file, content, (least, most) in (
        ("preprocessor_config.json", image, IMAGE_PIXELS),
        ("video_preprocessor_config.json", video, CLIP_PIXELS if name == "Qwen3VL" else VIDEO_PIXELS),
    ):
        pixels = {"min_pixels": least, "max_pixels": most}
        (folder / file).write_text(json.dumps(content | patches | normal | pixels, indent=2))
