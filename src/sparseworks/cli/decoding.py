"""`sparseworks bench --decode`: table, CSV, JSON and a picture of how language models decode."""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from sparseworks.core.errors import InvalidArgument

__all__ = ["bench_decoding"]

_WINDOWS = 16  # of 256 tokens, for perplexity


def bench_decoding(options: Any, loaded: Any) -> dict[str, Any]:
    """Compile, time in turn, draw. `options`: of `sparseworks bench`."""
    import torch

    import sparseworks as sw
    from sparseworks.diagnostics.claims import machine
    from sparseworks.diagnostics.decoding import measure_decoding
    from sparseworks.diagnostics.decoding_runtimes import DECODERS, decoding_peers, peak_memory
    from sparseworks.engine.decoder.packing import DTYPES, read_bandwidth

    if loaded.kind != "causal":
        raise InvalidArgument(f"--decode times causal language models; {loaded.name} is none")
    odd = sorted(set(options.decode_dtypes) - set(DTYPES))
    if odd:
        raise InvalidArgument(f"dtypes are {', '.join(DTYPES)}, not {odd[0]}")
    names = [p for p in options.peers if p in DECODERS] or list(DECODERS)
    threads = torch.get_num_threads()
    text = None
    if options.data is not None:
        if loaded.tokenizer is None:
            raise InvalidArgument("--data needs a tokenizer for the text")
        from sparseworks.data.text import read_text, token_ids

        ids = token_ids(read_text(options.data), loaded.tokenizer)
        text = ids[: ids.numel() // 256 * 256].view(-1, 256)[:_WINDOWS]
    notes: list[str] = []
    model = loaded.model
    candidates: list[Any] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for dtype in options.decode_dtypes:
            candidates.append(_ours(f"ours, {dtype}", model, dtype, options, notes, folder))
        for sparsity in options.sparsity:
            pruned = copy.deepcopy(model)
            sw.prune(pruned, "magnitude", sparsity=sparsity, pattern=options.pattern)
            for dtype in options.decode_dtypes:
                name = f"ours, {sparsity:.0%} {options.pattern}, {dtype}"
                candidates.append(_ours(name, pruned, dtype, options, notes, folder))
            del pruned
        candidates += decoding_peers(model, names, threads, folder, notes, loaded.tokenizer)
        candidates = [c for c in candidates if c is not None]
        rows = measure_decoding(
            candidates, model.config.vocab_size,
            context=options.context, repeat=max(1, options.repeat // 3), text=text,
        )  # fmt: skip
        for row, candidate in zip(rows, candidates, strict=True):
            row["peak_bytes"] = peak_memory(candidate, model.config, threads)
    result = {
        "machine": machine(), "model": Path(loaded.name).name,
        "read_gb_per_second": read_bandwidth(threads) / 1e9, "rows": rows,
        "notes": sorted(set(notes)),
    }  # fmt: skip
    if options.out is not None:
        _write(options.out, result)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        _show(result)
    return result


def _ours(name: str, model: Any, dtype: str, options: Any, notes: list[str], folder: Path) -> Any:
    import sparseworks as sw
    from sparseworks.diagnostics.decoding_runtimes import our_candidate

    decoder = sw.compile_decoder(model, dtype=dtype, head=options.head)
    if not hasattr(decoder, "native"):
        notes.extend(decoder.notes)
        return None
    return our_candidate(name, decoder, folder)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']}, {result['machine']['cpu']}, "
                        f"{result['read_gb_per_second']:.1f} GB/s read")  # fmt: skip
    lengths = [k for k in result["rows"][0] if k.startswith("prompt_")] if result["rows"] else []
    heads = ["candidate", "MB", "peak MB", "tokens a second", "10-90 %"]
    heads += [f"prompt of {k.split('_')[1]}" for k in lengths] + ["perplexity"]
    for heading in heads:
        first = heading == "candidate"
        table.add_column(heading, justify="left" if first else "right", no_wrap=first)
    for row in result["rows"]:
        told = row.get("perplexity")
        table.add_row(
            row["candidate"], f"{row['bytes'] / 1e6:.1f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_p10']:.0f}-{row['decode_p90']:.0f}",
            *(f"{row[k]:.0f}" for k in lengths), "" if told is None else f"{told:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for note in result["notes"]:
        console.print(f"  {note}", markup=False)


def _write(out: Path, result: dict[str, Any]) -> None:
    from sparseworks.cli.running import write_csv, write_json
    from sparseworks.io.atomic import atomic_file
    from sparseworks.report.decoding import decoding_figure

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "decode.json", result)
    write_csv(out / "decode.csv", result["rows"], otherwise=["candidate"])
    if importlib.util.find_spec("plotly") is None:
        return
    with atomic_file(out / "decode.html") as path:
        decoding_figure(result).write_html(path, include_plotlyjs=True)
