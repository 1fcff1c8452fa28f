"""Draw what a reduction keeps of some items: the input, each block of the tower, the language model, attention maps.

  python jobs/draw_kept_tokens.py --config configs/draw_demo.yaml
  python jobs/draw_kept_tokens.py --config configs/caption_videos_qwen2_vl.yaml --limit 2 --set output.uri=runs/drawn

Takes any job's configuration. Writes PNG files and `kept_tokens.html`, which needs no network. Merged groups share a
colour, what is gone is dark.
The same as `illava draw`, for `ray job submit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

from pipeline.report.command import draw_cli

if __name__ == "__main__":
    sys.exit(draw_cli(__doc__))
