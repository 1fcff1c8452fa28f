"""Caption videos: one text per clip, from object storage to Parquet.

  python jobs/caption_videos.py --config configs/demo.yaml
  python jobs/caption_videos.py --config configs/caption_videos_llava_onevision.yaml --dry-run
  ray job submit --working-dir . -- python jobs/caption_videos.py --config configs/demo.yaml

The same command again resumes; `illava verify OUTPUT` checks what was written.
The same as `illava caption`, for `ray job submit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

from pipeline.cli import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(__doc__))
