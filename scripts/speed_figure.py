"""docs/assets/speed.svg and decoding.svg from the committed benchmarks: bars beside others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/assets"
CASES = [  # file, sparsity, batch, title
    ("minilm", 0.9, 16, "MiniLM, 16 x 128 tokens, fp32, 90 % zeros"),
    ("minilm", 0.9, 1, "MiniLM, 1 x 128 tokens, fp32, 90 % zeros"),
    ("resnet56", 0.9, 64, "ResNet-56, 64 images, fp32, 90 % zeros"),
    ("resnet56", 0.9, 1, "ResNet-56, 1 image, fp32, 90 % zeros"),
    ("minilm-blocks-bf16", 0.75, 16, "MiniLM, 16 x 128 tokens, bf16, 75 % in 16 x 32 blocks"),
]
NAMES = {"ours": "sparseworks", "ours, dense weights": "sparseworks, dense weights"}
BAR, GAP, LEFT, WIDTH, SCALE = 16, 30, 190, 790, 440


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
    cases = []
    for title, rows in bars():
        torch_ms = dict(rows)["torch"]
        cases.append((title, [
            (NAMES.get(n, n), torch_ms / ms, f"{torch_ms / ms:.1f}x torch, {ms:.3g} ms", colour(n))
            for n, ms in rows
        ]))  # fmt: skip
    return picture(cases)


def decoding() -> str:
    """Tokens a second of a language model; longer is faster."""
    held: dict[str, Any] = json.loads((ROOT / "benchmarks/results/decoding.json").read_text())
    rows = sorted(held["rows"], key=lambda r: r["decode_tokens_per_second"])
    lines = []
    for row in rows:
        name, speed = row["candidate"], row["decode_tokens_per_second"]
        theirs = name.startswith("llama.cpp")
        shade = "#b0b7bf" if theirs else "#7fb8b5" if name.startswith("dense") else "#0b7a75"
        told = f"{speed:.0f} tokens/s, {row['bytes'] / 1e6:.0f} MB"
        lines.append((name, speed, told, shade))
    title = "Llama of 395M parameters, one text: sparseworks (green) beside llama.cpp (grey)"
    return picture([(title, lines)])


def colour(name: str) -> str:
    return {"ours": "#0b7a75", "ours, dense weights": "#7fb8b5"}.get(name, "#b0b7bf")


def picture(cases: list[tuple[str, list[tuple[str, float, str, str]]]]) -> str:
    """Bars (label, length, text, colour) under titles."""
    parts, y = [], 8
    for title, rows in cases:
        longest = max(size for _, size, _, _ in rows)
        parts.append(f'<text x="8" y="{y + 14}" font-weight="bold">{title}</text>')
        y += 22
        for label, size, text, shade in rows:
            length = SCALE * size / longest
            box = f'width="{length:.1f}" height="{BAR - 3}"'
            parts += [
                f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{label}</text>',
                f'<rect x="{LEFT}" y="{y}" {box} fill="{shade}"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{y + 12}">{text}</text>',
            ]
            y += BAR
        y += GAP - BAR
    style = 'font-family="sans-serif" font-size="12" fill="#24292f"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" {style}>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    for name, drawn in (("speed.svg", drawing()), ("decoding.svg", decoding())):
        (OUT / name).write_text(drawn)
        print(f"wrote {(OUT / name).relative_to(ROOT)}")
