"""Make the generated pages of docs/ from the code that they describe.

python docs/generate.py --write     # write them
python docs/generate.py --check     # exit 1 where a page is behind the code
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs.generators import cli, configuration, errors, licences, memory, rows, screens  # noqa: E402

PAGES: dict[str, Callable[[], str]] = {
    "docs/choose-a-model.md": memory.page,
    "docs/cli.md": cli.page,
    "docs/configuration.md": configuration.page,
    "docs/errors.md": errors.page,
    "docs/rows.md": rows.page,
    "docs/screens.md": screens.page,
    "THIRD_PARTY_LICENSES.md": licences.page,
}


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write the pages")
    action.add_argument("--check", action="store_true", help="exit 1 where a page is behind the code")
    options = parser.parse_args()
    behind = []
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        behind.append(name)
        if options.write:
            path.write_text(text, "utf-8")
            print(f"wrote {name}")
    if options.check and behind:
        sys.exit(f"{', '.join(behind)}: behind the code; run python docs/generate.py --write")


if __name__ == "__main__":
    main()
