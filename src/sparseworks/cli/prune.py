"""Make a trained model sparse in one shot, save it losslessly, and report what it cost.

The output folder holds the packed checkpoint, report.html (where plotly is installed), result.json,
and options.json, which `--config` accepts to repeat the run.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparseworks.cli.fields import (
    BatchSize,
    Data,
    EvalData,
    EvalSamples,
    Length,
    MethodOptions,
    Metrics,
    Model,
    Samples,
)
from sparseworks.cli.plugins import Plugins
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks prune`."""

    model: Model = ""
    method: str = "wanda"
    """Registered method; `sparseworks methods` lists them."""
    plugin: Plugins = ()
    sparsity: float | None = None
    """Fraction of zeros in [0, 1); may be left out with an N:M pattern."""
    pattern: str | None = None
    """unstructured, row, N:M, blockHxW, rows, columns; default: the method's own."""
    budget: str | None = None
    """uniform, erk, global; by sensitivity of blocks owl, alpha, ecoflap, cfsp (owl:spread=0.1 has
    options); default: the method's own."""
    data: Data = None
    samples: Samples = 128
    length: Length = 256
    batch_size: BatchSize = 8
    metric: Metrics = ()
    eval_data: EvalData = None
    eval_samples: EvalSamples = None
    continuations: int = 3
    """Of a language model: held-out texts that it continues, dense and pruned, for the report."""
    include: tuple[str, ...] = ()
    """Name patterns of the only weights to prune."""
    exclude: tuple[str, ...] = ()
    """Name patterns of weights to leave dense."""
    skip_indivisible: bool = False
    """Leave tensors dense that cannot take the pattern, instead of an error."""
    rounds: int | None = None
    """Prune in this many steps; default: the method's own."""
    recovery: str | None = None
    """refit: re-solve the kept weights of every row by least squares; dsnot: swap pruned and kept
    weights until the mean output error cancels (dsnot:cycles=20 has options)."""
    option: MethodOptions = ()
    seed: int = 0
    """Of calibration sampling and random methods."""
    dtype: str | None = None
    """fp32, bf16 or fp16; default fp32."""
    device: str | None = None
    """Compute blocks there, one at a time (cuda); default: where the model is."""
    signed_zeros: bool = True
    """Store the sign of zeros; without, -0.0 is saved as +0.0, which can be smaller."""
    stream: bool = False
    """Never hold the model: read, prune and write one block at a time, in the dtype on disk."""
    layout: Literal["dense", "packed"] = "dense"
    """What --stream writes: shards as transformers does, or one packed file."""
    shard_size: str = "5GB"
    """Of the largest shard that --stream writes."""
    spill: bool = False
    """With --stream, keep activations between blocks on disk."""
    resume: bool = False
    """Go on with a --stream that was interrupted, with the same options."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force."""
    force: bool = False
    """Replace the output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Prune, measure before and after, save, report; on all ranks that torchrun started."""
    from sparseworks.cli.ranks import process_group

    with process_group() as group:
        return run_on(options, group)


def run_on(options: Options, group: Any) -> dict[str, Any]:
    """The command on one rank of a group, or alone (None)."""
    import sparseworks as sw
    from sparseworks.cli.loading import default_metrics, load_model
    from sparseworks.cli.preparing import (
        calibration,
        check_inputs,
        check_output,
        make_metrics,
        prompts_of,
    )
    from sparseworks.cli.running import progress_bar
    from sparseworks.cli.values import parse_options
    from sparseworks.core import registry
    from sparseworks.core.patterns import check_sparsity, parse_pattern

    if not options.model:
        raise InvalidArgument(
            "no model given; for example: sparseworks prune minilm --sparsity 0.5"
        )
    extra = parse_options(options.option)
    method = registry.build(options.method, ("one-shot", "search", "staged"), **extra)
    legal = parse_pattern(options.pattern or "unstructured")
    if options.sparsity is not None:
        check_sparsity(options.sparsity)
    elif legal.fixed_density is None and method.info.kind != "search":
        raise InvalidArgument("give --sparsity (a fraction in [0, 1)) or an N:M --pattern")
    check_output(options.out, options.force or options.resume)
    if options.stream:
        from sparseworks.cli.streamed import prune_streamed

        summary = prune_streamed(options, extra, group, command_of(options))
        show(summary, options.json)
        return summary
    if options.resume or options.spill:
        raise InvalidArgument("--resume and --spill go with --stream")
    check_inputs(options)
    loaded = load_model(options.model, options.dtype)
    names = options.metric or default_metrics(loaded, options.eval_data)
    # the calibration data first: metrics run the model, and data that does not do is refused
    batches = calibration(loaded, options)
    metrics = make_metrics(names, loaded, options.eval_data, options.eval_samples)
    before = {m.name: m(loaded.model) for m in metrics}
    prompts = prompts_of(loaded, options) if options.out is not None else None
    said = [] if prompts is None else prompts.continued(loaded.model)
    with progress_bar("pruning", quiet=options.json) as progress:
        result = sw.prune(
            loaded.model,
            options.method,
            sparsity=options.sparsity,
            pattern=options.pattern,
            budget=options.budget,
            data=batches,
            include=options.include or None,
            exclude=options.exclude or None,
            skip_indivisible=options.skip_indivisible,
            rounds=options.rounds,
            recovery=options.recovery,
            seed=options.seed,
            device=options.device,
            group=group,
            progress=progress,
            **extra,
        )
    after = {m.name: m(loaded.model) for m in metrics}
    summary = summarize(options, loaded, result, metrics, before, after)
    if prompts is not None:
        summary["continuations"] = prompts.beside(said, prompts.continued(loaded.model))
    if options.out is not None and (group is None or group.rank() == 0):
        write_output(options, loaded, result, summary)
    show(summary, options.json)
    return summary


def summarize(
    options: Any, loaded: Any, result: Any, metrics: Any, before: Any, after: Any
) -> dict[str, Any]:
    """Everything the report and result.json say."""
    from sparseworks.cli.running import plain_options
    from sparseworks.diagnostics.claims import machine

    return {
        "command": command_of(options),
        "options": plain_options(options),
        "model": loaded.name,
        "class": type(loaded.model).__name__,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "dense_bytes": sum(
            t.numel() * t.element_size() for t in {
                id(t): t for t in loaded.model.state_dict(keep_vars=True).values()
            }.values()
        ),
        "metrics": [
            {
                "name": m.name,
                "unit": m.unit,
                "higher_is_better": m.higher_is_better,
                "before": before[m.name],
                "after": after[m.name],
            }
            for m in metrics
        ],
        "result": result.to_dict(),
        "machine": machine(),
    }  # fmt: skip


def command_of(options: Any, command: str = "prune") -> str:
    """The command line that repeats this run."""
    import dataclasses

    words = ["sparseworks", command, options.model]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = value == field.default and field.name != "method"
        if field.name == "model" or default or value in ((), None):
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def write_output(options: Any, loaded: Any, result: Any, summary: dict[str, Any]) -> None:
    """Checkpoint, report and result in one new folder, or nothing at all."""
    from sparseworks.cli.running import plain_options, write_json
    from sparseworks.io import save
    from sparseworks.io.atomic import replaced_folder
    from sparseworks.report.page import write_report
    from sparseworks.weights.structured import save_slim

    out: Path = options.out
    with replaced_folder(out) as made:
        folder = hasattr(loaded.model, "config") and hasattr(loaded.model, "save_pretrained")
        target = made / ("checkpoint" if folder else "model.safetensors")
        if result.changes:  # shapes that no config tells
            save_slim(result, target)
            if folder and loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(target)
            signed = 0
        else:
            signed = save(
                loaded.model,
                target,
                tokenizer=loaded.tokenizer if folder else None,
                signed_zeros=options.signed_zeros,
            ).signed_zero_bytes
        files = [target] if target.is_file() else [f for f in target.rglob("*") if f.is_file()]
        summary["file_bytes"] = sum(
            f.stat().st_size for f in files if f.suffix not in (".json", ".txt", ".jinja")
        )
        summary["signed_zero_bytes"] = signed
        summary["checkpoint"] = str(out / target.name)
        write_json(made / "result.json", summary)
        write_json(made / "options.json", plain_options(options))
        if importlib.util.find_spec("plotly") is not None:
            write_report(made / "report.html", summary, loaded.model)


def show(summary: dict[str, Any], as_json: bool) -> None:
    """The result in the terminal."""
    if as_json:
        json.dump(summary, sys.stdout, indent=1, default=str)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    from sparseworks.core.types import dense_lines
    from sparseworks.io.summary import signed_zero_note
    from sparseworks.report.text import megabytes

    console = Console()
    result = summary["result"]
    table = Table(title=f"{summary['model']}: {result['method']}", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("sparsity of the pruned tensors", "", f"{result['sparsity']:.2%}")
    for m in summary["metrics"]:
        table.add_row(f"{m['name']} {m['unit']}", f"{m['before']:.4g}", f"{m['after']:.4g}")
    if "file_bytes" in summary:
        table.add_row("file", megabytes(summary["dense_bytes"]), megabytes(summary["file_bytes"]))
    console.print(table)
    if note := signed_zero_note(summary.get("signed_zero_bytes", 0), summary.get("file_bytes", 0)):
        console.print(f"{note}: --no-signed-zeros stores +0.0")
    for warning in result["warnings"]:
        console.print(f"warning: {warning}")
    for line in dense_lines(result["skipped"]):
        console.print(line.strip(), markup=False)
    if "checkpoint" in summary:
        out = Path(summary["checkpoint"]).parent
        page = out / ("report.html" if (out / "report.html").exists() else "result.json")
        console.print(f"wrote {summary['checkpoint']} and {page}")
