"""Builds the tiny demo model's architecture, tokenizer and processor files: an untrained Hugging Face folder.

``python -m benchmarks.toy_model.training.architecture --out FOLDER`` writes the untrained model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks.toy_model.data import vocabulary as words
from benchmarks.toy_model.data.mixture import KINDS, make
from benchmarks.toy_model.data.samples import PATCH_PX, SIZE_PX

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
_SPACE, _OWN_PART, _BARE_PART = "\u0120", 0.6, 0.8  # byte-level BPE writes a space as this letter
VOCABULARY_SIZE = 576
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _corpus(num_samples: int) -> Iterator[str]:
    """The generator's own text, less the free glyph strings, whose pairs must stay single tokens."""
    for kind in KINDS:
        for seed in range(num_samples):
            for question in make(kind, seed, split="tokenizer", num_frames=4).questions:
                yield question.text
                if question.task != "document_line":
                    yield question.answer
    easy = ("what is the shape in the image?", "does the image not contain a rectangle?", "is there not a teal shape?")
    easy += ("what color is the brown shape present?", "is no black gray yellow circle triangle present?")
    yield from ["user assistant " + " ".join(words.COLOURS)] * 200
    yield from easy * 100


def build_tokenizer(num_samples: int = 150) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 576 entries with Qwen2's splitting rule: every digit is a token."""
    from tokenizers import Regex

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(num_samples), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionConfig:
    """SigLIP 10 x 128 at 14 x 14 patches, Qwen2 6 x 128, tied embeddings."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 10,
        "num_attention_heads": 4,
        "image_size": SIZE_PX,
        "patch_size": PATCH_PX,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[SIZE_PX, SIZE_PX]],
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
    )


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """2-D sine-cosine codes [grid * grid, width], a start for the learned position table."""
    quarter = width // 4
    rate = 1.0 / (100.0 ** (torch.arange(quarter) / quarter))
    angle = torch.arange(grid)[:, None] * rate[None]
    code = torch.cat([angle.sin(), angle.cos()], 1)
    rows, cols = code[:, None].expand(-1, grid, -1), code[None].expand(grid, -1, -1)
    return torch.cat([rows, cols], -1).reshape(grid * grid, width)


def build_model(config: LlavaOnevisionConfig, *, seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    """Random weights, with the starts that help a small tower: sine-cosine positions, queries near keys."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config)
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        width, grid = config.vision_config.hidden_size, SIZE_PX // PATCH_PX
        tower.embeddings.position_embedding.weight.copy_(0.3 * sincos_positions(grid, width))
        for layer in tower.encoder.layers:
            key = layer.self_attn.k_proj.weight
            layer.self_attn.q_proj.weight.copy_(key + 0.3 * key.std() * torch.randn_like(key))
        model.get_input_embeddings().weight.normal_(0, 0.05)
        model.model.image_newline.normal_(0, 0.05)
    return model


@torch.no_grad()
def let_spaced_words_start_alike(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: object, *, among: Collection[str] | None = None
) -> None:
    """Give each word behind a space (" A", as in questions) most of the bare word's embedding ("A", as in answers).

    To the tokenizer they are two tokens, of which training tells no more than that they turn up together: after 100
    minutes the letters of the tables' questions still had nothing to do with those of the answers.

    Args:
        model: its embeddings are changed.
        tokenizer: its vocabulary.
        among: bare words this is confined to; None: all.
    """
    words, vocabulary = model.get_input_embeddings().weight, tokenizer.get_vocab()
    for token, index in vocabulary.items():
        word = token.removeprefix(_SPACE)
        bare = vocabulary.get(word)
        if bare is not None and token.startswith(_SPACE) and (among is None or word in among):
            words[index] = _OWN_PART * words[index] + _BARE_PART * words[bare]


def write_processor_files(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokenizer, chat template and the three processor files."""
    tokenizer.save_pretrained(folder)
    size = {"height": SIZE_PX, "width": SIZE_PX}
    half = [0.5, 0.5, 0.5]
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": half,
        "image_std": half,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": size,
    }
    image = {
        **pixels,
        "do_pad": True,
        "image_grid_pinpoints": [[SIZE_PX, SIZE_PX]],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
    }
    video = {
        **pixels,
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "processor_class": "LlavaOnevisionProcessor",
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (SIZE_PX // PATCH_PX) ** 2,
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
    }
    for name, content in {
        "preprocessor_config.json": image,
        "video_preprocessor_config.json": video,
        "processor_config.json": processor,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_folder(
    folder: Path, model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The whole Hugging Face folder, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    write_processor_files(folder, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    write_folder(args.out, build_model(build_config(tokenizer), seed=args.seed), tokenizer)
    print(f"untrained model written to {args.out}")


if __name__ == "__main__":
    main()
