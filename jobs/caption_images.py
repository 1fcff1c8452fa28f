"""Caption images and image sets: one text per item, from object storage to Parquet.

  python jobs/caption_images.py --config configs/caption_images_llava_onevision.yaml --dry-run
  python jobs/caption_images.py --config configs/caption_images_llava_onevision.yaml --set input.uri=photos/ --limit 10
  ray job submit --working-dir . -- python jobs/caption_images.py --config configs/caption_images_llava_onevision.yaml

Each listed image is one item; several images make one item where a manifest gives them in a column `uris`.
The same command again resumes; `illava verify OUTPUT` checks what was written.
The same as `illava caption`, for `ray job submit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

from pipeline.cli import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(__doc__))
