"""Measure plans x settings x models on one set of items: one Parquet, one picture and one table a table.

  python jobs/sweep_reduction.py --config configs/sweep_demo.yaml
  python jobs/sweep_reduction.py --config configs/sweep_paper.yaml --set only=[table-4] --dry-run

Quality is accuracy where the manifest has references, and agreement with the unreduced model always; models of random
weights are refused unless `quality: false` asks for speed only. The same command goes on where it was stopped.
The same as `illava sweep`, for `ray job submit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

from pipeline.sweep.command import sweep_cli

if __name__ == "__main__":
    sys.exit(sweep_cli(__doc__))
