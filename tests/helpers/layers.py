"""The layers of the packages, as docs/architecture.md lists them, and the picture of them.

PYTHONPATH=tests python -m helpers.layers    # draw docs/images/layers.svg again
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, PICTURE = ROOT / "docs/architecture.md", ROOT / "docs/images/layers.svg"
ROW, GAP, WIDTH, LABEL = 34, 10, 860, 300  # pixels


def layers(page: Path = PAGE) -> list[tuple[str, list[str]]]:
    """Return the layers that a page lists, the highest first: what a layer does, and its packages."""
    listed = re.search(r"<!-- layers.*?-->\n(.*?)<!-- end -->", page.read_text(encoding="utf-8"), re.DOTALL)
    assert listed, f"{page}: no list of layers between <!-- layers --> and <!-- end -->"
    rows = [line.strip("| ").split(" | ") for line in listed[1].splitlines() if "`" in line]
    return [(name, re.findall(r"`([\w.]+)`", packages)) for name, packages in rows]


def picture() -> str:
    """Return the picture as SVG: a row for each layer, a box for each package."""
    rows = layers()
    height = len(rows) * (ROW + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for place, (name, packages) in enumerate(rows):
        top, share = GAP + place * (ROW + GAP), (WIDTH - LABEL - GAP) / len(packages)
        parts.append(f'<text x="{GAP}" y="{top + 22}" fill="#555555">{name}</text>')
        for number, package in enumerate(packages):
            left = LABEL + number * share
            parts += [
                f'<rect x="{left:.1f}" y="{top}" width="{share - GAP:.1f}" height="{ROW}" rx="5" '
                'fill="#e8f0fb" stroke="#4a78b5"/>',
                f'<text x="{left + (share - GAP) / 2:.1f}" y="{top + 22}" text-anchor="middle" '
                f'font-family="monospace">{package}</text>',
            ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
