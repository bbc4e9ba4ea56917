"""Time a model: ours sparse and dense beside torch, onnxruntime and openvino, in one run.

Candidates take turns in short blocks with rests between them. The output folder holds bench.csv,
bench.json, and bench.html (where plotly is installed).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseworks.cli.fields import Model
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks bench`."""

    model: Model = ""
    weights: Path | None = None
    """A checkpoint that `sparseworks prune` wrote: time it as it is."""
    sparsity: tuple[float, ...] = ()
    """Prune by magnitude (global where unstructured) first; none: the model as it is."""
    pattern: str = "unstructured"
    """Of that pruning, for example 2:4 or block16x32."""
    batch: tuple[int, ...] = (1,)
    """Samples a call."""
    tokens: int = 128
    """Tokens of each text."""
    input_shape: tuple[int, ...] = ()
    """Shape of one sample (3 224 224) where the model does not tell."""
    dtype: str = "fp32"
    """fp32, bf16 or int8."""
    peers: tuple[str, ...] = ("torch", "onnxruntime", "openvino")
    """What to compare with; also torch.compile, which takes a minute to build. With --decode:
    llama.cpp, onnxruntime-genai, transformers."""
    decode: bool = False
    """Time a causal language model token by token, beside llama.cpp, onnxruntime-genai and
    transformers."""
    decode_dtypes: tuple[str, ...] = ("bf16", "int8", "int4")
    """With --decode: what weights are kept in."""
    head: str | None = None
    """With --decode: the dtype of the output head, where it is another one."""
    context: int = 0
    """With --decode: tokens before the decoding that is timed; 0: 64."""
    data: str | None = None
    """With --decode: a text whose perplexity is measured."""
    repeat: int = 15
    """Calls of each candidate, at least."""
    out: Path | None = None
    """Output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Prune, compile, time in turn, draw."""
    import torch

    import sparseworks as sw
    from sparseworks.cli.examples import random_example
    from sparseworks.cli.loading import load_model, parse_precision
    from sparseworks.cli.preparing import check_inputs
    from sparseworks.diagnostics.claims import machine
    from sparseworks.diagnostics.decoding_runtimes import DECODERS
    from sparseworks.diagnostics.turns import in_turn
    from sparseworks.engine.peers import PEERS, peer
    from sparseworks.io.atomic import check_place

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks bench minilm")
    known = (*PEERS, *DECODERS) if options.decode else PEERS
    odd = sorted(set(options.peers) - set(known))
    if odd or options.repeat < 1:
        raise InvalidArgument(f"peers are {', '.join(known)}, not {odd}" if odd
                              else f"repeat={options.repeat} must be at least 1")  # fmt: skip
    dtype = parse_precision(options.dtype)
    if options.weights is not None and options.sparsity:
        raise InvalidArgument("--weights are timed as they are; leave --sparsity out")
    check_inputs(options)
    if options.out is not None:
        check_place(options.out / "bench.json")
    loaded = load_model(options.model)
    if options.weights is not None:
        sw.load(options.weights, loaded.model)
    if options.decode:
        from sparseworks.cli.decoding import bench_decoding

        return bench_decoding(options, loaded)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for sparsity in options.sparsity or (None,):
        model = copy.deepcopy(loaded.model).eval()
        if sparsity is not None:
            sw.prune(
                model, "magnitude", sparsity=sparsity, pattern=options.pattern,
                budget="global" if options.pattern == "unstructured" else "uniform",
            )  # fmt: skip
        for batch in options.batch:
            example = random_example(
                loaded, batch, tokens=options.tokens, input_shape=options.input_shape
            )
            calls: dict[str, Callable[[], Any]] = {}
            calls |= _ours("ours", model, example, dtype, notes)
            if sparsity is not None:
                calls |= _ours("ours, dense weights", loaded.model, example, dtype, notes)
            with tempfile.TemporaryDirectory() as place:
                for name in options.peers:
                    made = peer(name, model, example, dtype, torch.get_num_threads(), Path(place))
                    if isinstance(made, str):
                        notes.append(f"{name}: {made}")
                    else:
                        calls[name] = made
                times = in_turn(calls, options.repeat)
            rows += _rows(times, sparsity, batch)
    result = {
        "machine": machine(), "model": Path(loaded.name).name, "dtype": options.dtype,
        "rows": rows, "notes": sorted(set(notes)),
    }  # fmt: skip
    if options.out is not None:
        _write(options.out, result)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        _show(result)
    return result


def _ours(
    name: str, model: Any, example: Any, dtype: Any, notes: list[str]
) -> dict[str, Callable[[], Any]]:
    """The compiled model, where it runs as more than torch."""
    import sparseworks as sw
    from sparseworks.models.calls import Arguments

    compiled = sw.compile(model, example, dtype=dtype)
    if compiled.kind == "torch":
        notes.append(f"{name}: torch is fastest ({'; '.join(compiled.notes) or 'measured'})")
        return {}
    if compiled.kind != "program":
        notes.append(f"{name}: runs by {compiled.kind} ({'; '.join(compiled.notes) or 'measured'})")
    given = Arguments.of(example)
    return {name: lambda: compiled(*given.args, **given.kwargs)}


def _rows(
    times: dict[str, list[float]], sparsity: float | None, batch: int
) -> list[dict[str, Any]]:
    reference = statistics.median(times["ours"]) if "ours" in times else None
    found = []
    for name, values in times.items():
        middle = statistics.median(values)
        ordered = sorted(values)
        found.append({
            "sparsity": sparsity, "batch": batch, "candidate": name, "median_ms": middle,
            "p10_ms": ordered[len(ordered) // 10], "p90_ms": ordered[-1 - len(ordered) // 10],
            "ours_is_faster_by": None if reference is None else middle / reference,
        })  # fmt: skip
    return found


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']}, {result['dtype']}, {result['machine']['cpu']}")
    for heading in ("sparsity", "batch", "candidate", "median ms", "10-90 %", "ours is faster by"):
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    for row in result["rows"]:
        ratio = row["ours_is_faster_by"]
        table.add_row(
            "as it is" if row["sparsity"] is None else f"{row['sparsity']:.0%}",
            str(row["batch"]), row["candidate"], f"{row['median_ms']:.2f}",
            f"{row['p10_ms']:.2f}-{row['p90_ms']:.2f}", "" if ratio is None else f"{ratio:.2f}x",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for note in result["notes"]:
        console.print(f"  {note}", markup=False)


def _write(out: Path, result: dict[str, Any]) -> None:
    from sparseworks.cli.running import write_csv, write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "bench.json", result)
    write_csv(out / "bench.csv", result["rows"], otherwise=["candidate"])
    if importlib.util.find_spec("plotly") is not None:
        from sparseworks.report.bench import write_bench

        write_bench(out / "bench.html", result)
