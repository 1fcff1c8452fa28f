"""Read documents: PDFs, TIFFs and page images in, one row a document with every page's markdown or JSON out.

  python jobs/process_documents.py --config configs/process_documents.yaml --dry-run
  python jobs/process_documents.py --config configs/process_documents.yaml --set input.uri=papers/ --limit 10
  ray job submit --working-dir . -- python jobs/process_documents.py --config configs/process_documents.yaml

Each listed file is one document; page images make one document where a manifest gives them in a column `uris`.
The same command again resumes; `illava verify OUTPUT` checks what was written.
The same as `illava documents`, for `ray job submit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

from pipeline.cli import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(__doc__))
