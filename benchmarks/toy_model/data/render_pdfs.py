"""Renders PDFs whose pages the demo model can read, a picture of 112 px each, and what is true of every page.

The pages come from split ``demo``, which nothing is trained or tested on. A page is 112 x 112 points, so that it has
112 px at ``media.page_dpi: 72``.

    python -m benchmarks.toy_model.data.render_pdfs --folder configs/demo/documents --count 3
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.toy_model.data.charts import make_chart
from benchmarks.toy_model.data.documents import make_table
from benchmarks.toy_model.data.samples import Sample

_KINDS = {"table": make_table, "chart": make_chart}
_QUALITY = 90  # of each page's JPEG
_BEGAN = time.gmtime(0)  # the files say no other time, so that the same command writes the same bytes


def page_sample(kind: str, seed: int) -> Sample:
    """One page with its caption, which is its last question."""
    return _KINDS[kind](np.random.default_rng([zlib.crc32(f"demo/page/{kind}".encode()), seed]))


def render(folder: Path, count: int) -> list[dict[str, object]]:
    """Write ``count`` PDFs of one page more each, and ``pages.jsonl``; return its rows: uri, page from 0, reference."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number in range(count):
        name, kinds = f"document_{number}.pdf", [list(_KINDS)[page % len(_KINDS)] for page in range(number + 1)]
        samples = [page_sample(kind, 10 * number + page) for page, kind in enumerate(kinds)]
        first, *others = [Image.fromarray(sample.frames[0]) for sample in samples]
        first.save(
            folder / name,
            save_all=True,
            append_images=others,
            resolution=72,
            quality=_QUALITY,
            creationDate=_BEGAN,
            modDate=_BEGAN,
            producer="benchmarks.toy_model.data.render_pdfs",
        )
        rows += [
            {"uri": name, "page": page, "reference": sample.questions[-1].answer} for page, sample in enumerate(samples)
        ]
    (folder / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=3)
    args = parser.parse_args()
    rows = render(args.folder, args.count)
    print(f"{args.count} documents of {len(rows)} pages in {args.folder}")


if __name__ == "__main__":
    main()
