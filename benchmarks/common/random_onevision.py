"""Random-weight LLaVA-OneVision folders at named sizes: true shapes for speed, nothing for quality.

python benchmarks/common/random_onevision.py OUT so400m-0.5b
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from illava.model_files import declare_random_weights
from tests.support.models.onevision import make_onevision

SIZES: dict[str, dict[str, Any]] = {
    # 14 x 14 = 196 patches; four cuts of 24 leave the square 100
    "tiny": {
        "side": 112,
        "patch": 8,
        "vision": {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6},
        "text": {"hidden_size": 192, "intermediate_size": 480, "num_hidden_layers": 6, "num_attention_heads": 6},
    },
    # SigLIP so400m/14@384 up to the block whose output is used, and Qwen2-0.5B with a byte vocabulary
    "so400m-0.5b": {
        "side": 384,
        "patch": 14,
        "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16},
        "text": {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
}


def make_random_onevision(folder: str | Path, size: str) -> Path:
    """Write the folder of a named size and return it."""
    made = make_onevision(folder, **SIZES[size])
    declare_random_weights(made)
    return made


if __name__ == "__main__":
    print(make_random_onevision(sys.argv[1], sys.argv[2]))
