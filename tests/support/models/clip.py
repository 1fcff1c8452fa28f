"""Tiny random-weight CLIP and CLIPSeg folders in the Hugging Face format, for tests. Says nothing about relevance."""

from __future__ import annotations

import json
from pathlib import Path

SIDE, PATCH = 32, 8


def make_clip(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a CLIP folder: 4 x 4 patches, two layers of width 32 on either side."""
    from transformers import CLIPConfig, CLIPModel

    return _write(folder, CLIPModel, CLIPConfig, seed=seed)


def make_clipseg(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a CLIPSeg folder: as `make_clip`, with a decoder that reads layers 1 and 2 of three."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    return _write(
        folder,
        CLIPSegForImageSegmentation,
        CLIPSegConfig,
        seed=seed,
        extract_layers=[1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )


def _write(folder, model_class, config_class, *, seed, **own) -> Path:
    import torch
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_bytes(), eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = config_class(
        text_config={
            **width,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**width, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=16,
        **own,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embedding" not in name:
                weight.data.mul_(3)
    model.save_pretrained(folder)
    image = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.3, 0.35], "size": {"shortest_edge": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder


def _bytes():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<|end|>"])
    core.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 256)])
    return core
