"""LoRA adapters of tiny models, as peft writes them after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.models.families import stock_class


def make_lora(base: Path, folder: Path, model_type: str, targets: str | list[str], *, trained_on: str = "") -> Path:
    """Write an adapter with random tensors on the layers that peft finds by ``targets``; trained on a hub's model."""
    from peft import LoraConfig, get_peft_model

    model: Any = stock_class(model_type).from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = trained_on or str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
