"""Draw what a reduction keeps of some items: the input, each block of the tower, the language model, attention maps.

  python jobs/draw_kept_tokens.py --config configs/draw_demo.yaml
  python jobs/draw_kept_tokens.py --config configs/caption_videos_qwen2_vl.yaml --limit 2 --set output.uri=runs/drawn

Takes any job's configuration. Writes PNG files and `kept_tokens.html`, which needs no network. Merged groups share a
colour, what is gone is dark.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

from pipeline.cli import config_cli


def draw(options: argparse.Namespace) -> int:
    """Draw a job's items and print what was written."""
    from pipeline.report.draw import run_drawing

    return run_drawing(options)


if __name__ == "__main__":
    sys.exit(config_cli(__doc__, draw))
