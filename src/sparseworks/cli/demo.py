"""Prune a real pretrained sentence encoder three ways and show what it cost.

MiniLM-L6 (22 million parameters) is pruned with magnitude, Wanda and SparseGPT at 50 % and 2:4,
calibrated on docstrings of the standard library. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Options", "run"]

_METHODS = ("magnitude", "wanda", "sparsegpt")
_AMOUNTS = ("0.5", "2:4")


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks demo`."""

    out: Path = Path("out/demo")
    """Output folder; replaced when it exists."""
    samples: int = 128
    """Calibration docstrings."""
    eval_samples: int = 200
    """Held-out docstrings for fidelity and retrieval."""


def run(options: Options) -> dict[str, Any]:
    """Prune, measure, save, report, and print a table."""
    from rich.console import Console
    from rich.table import Table

    import sparseworks as sw
    from sparseworks.cli.loading import load_model
    from sparseworks.cli.preparing import calibration, make_metrics
    from sparseworks.cli.prune import Options as PruneOptions
    from sparseworks.cli.prune import summarize, write_output
    from sparseworks.cli.recipes import parse_amount
    from sparseworks.cli.running import progress_bar, write_json
    from sparseworks.report.text import megabytes

    console = Console()
    began = time.perf_counter()
    console.print("loading MiniLM-L6 and the standard library's docstrings")
    loaded = load_model("minilm")
    metrics = make_metrics(("fidelity", "retrieval"), loaded, None, options.eval_samples)
    dense = copy.deepcopy(loaded.model)
    before = {m.name: m(dense) for m in metrics}
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with progress_bar("demo") as progress:
        for method in _METHODS:
            for amount in _AMOUNTS:
                settings = PruneOptions(
                    model="minilm",
                    method=method,
                    out=options.out / f"{method}-{amount.replace(':', 'of')}",
                    samples=options.samples,
                    force=True,
                    **parse_amount(amount),
                )
                twin = copy.deepcopy(dense)
                batches = calibration(loaded, settings)
                result = sw.prune(twin, method, data=batches, **parse_amount(amount))
                case = type(loaded)(twin, loaded.kind, loaded.tokenizer, loaded.name)
                after = {m.name: m(twin) for m in metrics}
                summary = summarize(settings, case, result, metrics, before, after)
                write_output(settings, case, result, summary)
                rows.append({"method": method, "amount": amount, **after, **_sizes(summary)})
                progress(len(rows), len(_METHODS) * len(_AMOUNTS), f"{method} {amount}")
    table = Table(title="MiniLM-L6, all linear layers pruned", title_justify="left")
    for column in ("method", "sparsity", "fidelity", "retrieval", "file", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    dense_bytes = megabytes(rows[0]["dense_bytes"])
    table.add_row("dense", "", "1", f"{before['retrieval']:.1f} %", dense_bytes, "")
    for r in rows:
        table.add_row(
            r["method"],
            r["amount"],
            f"{r['fidelity']:.4f}",
            f"{r['retrieval']:.1f} %",
            megabytes(r["file_bytes"]),
            f"{r['seconds']:.1f}",
        )
    console.print(table)
    write_json(options.out / "demo.json", {"dense": before, "rows": rows})
    console.print(
        f"fidelity: mean cosine to the dense embeddings; retrieval: docstring summaries matched to "
        f"their bodies\nreports: {options.out}/*/report.html; "
        f"in all {time.perf_counter() - began:.0f} s"
    )
    return {"dense": before, "rows": rows}


def _sizes(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "dense_bytes": summary["dense_bytes"],
        "file_bytes": summary["file_bytes"],
        "sparsity": summary["result"]["sparsity"],
        "seconds": summary["result"]["seconds"],
    }
