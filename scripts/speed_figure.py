"""docs/assets/speed.svg from the committed benchmarks: bars of throughput beside other runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/assets/speed.svg"
CASES = [  # file, sparsity, batch, title
    ("minilm", 0.9, 16, "MiniLM, 16 x 128 tokens, fp32, 90 % zeros"),
    ("minilm", 0.9, 1, "MiniLM, 1 x 128 tokens, fp32, 90 % zeros"),
    ("resnet56", 0.9, 64, "ResNet-56, 64 images, fp32, 90 % zeros"),
    ("resnet56", 0.9, 1, "ResNet-56, 1 image, fp32, 90 % zeros"),
    ("minilm-blocks-bf16", 0.75, 16, "MiniLM, 16 x 128 tokens, bf16, 75 % in 16 x 32 blocks"),
]
NAMES = {"ours": "sparseworks", "ours, dense weights": "sparseworks, dense weights"}
BAR, GAP, LEFT, WIDTH, SCALE = 16, 30, 190, 760, 440


def bars() -> list[tuple[str, list[tuple[str, float]]]]:
    """Per case: milliseconds of each candidate."""
    found = []
    for name, sparsity, batch, title in CASES:
        held: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        rows = [r for r in held["rows"] if r["sparsity"] == sparsity and r["batch"] == batch]
        found.append((title, [(r["candidate"], r["median_ms"]) for r in rows]))
    return found


def drawing() -> str:
    """Throughput relative to torch; longer is faster."""
    parts, y = [], 8
    for title, rows in bars():
        torch_ms = dict(rows)["torch"]
        longest = max(torch_ms / ms for _, ms in rows)
        parts.append(f'<text x="8" y="{y + 14}" font-weight="bold">{title}</text>')
        y += 22
        for name, ms in rows:
            length = SCALE * torch_ms / ms / longest
            colour = {"ours": "#0b7a75", "ours, dense weights": "#7fb8b5"}.get(name, "#b0b7bf")
            label, figures = NAMES.get(name, name), f"{torch_ms / ms:.1f}x torch, {ms:.3g} ms"
            size = f'width="{length:.1f}" height="{BAR - 3}"'
            parts += [
                f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{label}</text>',
                f'<rect x="{LEFT}" y="{y}" {size} fill="{colour}"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{y + 12}">{figures}</text>',
            ]
            y += BAR
        y += GAP - BAR
    style = 'font-family="sans-serif" font-size="12" fill="#24292f"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" {style}>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(drawing())
    print(f"wrote {OUT.relative_to(ROOT)}")
