"""Score a causal language model on tasks of lm-evaluation-harness: a folder, pruned or dense, or a
compiled decoder.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks evaluate`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """Hugging Face folder or hub name, file.py:factory, or a decoder that `compile` wrote."""
    tasks: tuple[str, ...] = ()
    """Names that the harness knows, or YAML files that describe a task."""
    weights: Path | None = None
    """A checkpoint that `sparseworks prune` wrote, loaded into the model."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, where the model has none."""
    dtype: str | None = None
    """fp32, bf16 or fp16; default fp32."""
    decode: str | None = None
    """Compile the model first, its weights in fp32, bf16, int8 or int4."""
    limit: int | None = None
    """Documents of a task at most."""
    fewshot: int | None = None
    """Solved examples before each question; default: as the task says."""
    batch_size: int = 8
    """Texts at once."""
    seed: int = 0
    """Of the choice of examples."""
    out: Path | None = None
    """JSON file for the scores."""
    json: bool = False
    """Print as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Load, score, show."""
    from sparseworks.cli.preparing import check_output
    from sparseworks.cli.running import plain_options, write_json
    from sparseworks.diagnostics.claims import machine
    from sparseworks.diagnostics.harness import evaluate

    if not options.model or not options.tasks:
        raise InvalidArgument(
            "give a model and --tasks; for example: sparseworks evaluate ./llama --tasks arc_easy"
        )
    check_output(options.out, force=True)
    model, tokenizer = _model(options)
    began = time.perf_counter()
    scores = evaluate(
        model, tokenizer, options.tasks, limit=options.limit, fewshot=options.fewshot,
        batch_size=options.batch_size, seed=options.seed,
    )  # fmt: skip
    found = {
        "model": options.model,
        "scores": [dataclasses.asdict(s) for s in scores],
        "seconds": time.perf_counter() - began,
        "options": plain_options(options),
        "machine": machine(),
    }
    if options.out is not None:
        write_json(options.out, found)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    return found


def _model(options: Options) -> tuple[Any, Any]:
    from sparseworks.cli.decoders import causal_model, decoder_of, is_decoder

    if is_decoder(options.model) and (options.decode or options.dtype):
        raise InvalidArgument("--decode and --dtype are for models; a decoder has its weights")
    if options.decode and options.dtype:
        raise InvalidArgument("give --dtype of the model or --decode of the decoder, not both")
    named = {"weights": options.weights, "tokenizer": options.tokenizer}
    if is_decoder(options.model) or options.decode:
        return decoder_of(options.model, dtype=options.decode or "bf16", **named)  # type: ignore[arg-type]
    return causal_model(options.model, dtype=options.dtype, **named)  # type: ignore[arg-type]


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found['model']}, {found['seconds']:.0f} s", title_justify="left")
    for column in ("task", "metric", "value", "standard error", "documents"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for score in found["scores"]:
        error = "" if score["error"] is None else f"{score['error']:.4f}"
        row = (score["task"], score["metric"], f"{score['value']:.4f}", error, score["samples"])
        table.add_row(*map(str, row))
    Console().print(table)
