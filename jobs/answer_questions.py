"""Answer questions about videos and images: a manifest of media and questions in, answers with scores out.

  python jobs/answer_questions.py --config configs/answer_questions.yaml --dry-run
  ray job submit --working-dir . -- python jobs/answer_questions.py --config configs/answer_questions.yaml

A benchmark's files become a manifest by `python -m pipeline convert`; two runs are compared by
`python -m pipeline compare RUN_A RUN_B`. The same command again resumes.
The same as `illava answer`, for `ray job submit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

from pipeline.cli import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(__doc__))
