"""Cut channels, hidden units and heads: a smaller dense model that any runtime runs faster.

The output folder holds the slimmed model, report.html (where plotly is installed), result.json,
options.json, and model.onnx on request.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparseworks.cli.fields import Length, MethodOptions, Model
from sparseworks.cli.plugins import Plugins
from sparseworks.core.errors import InvalidArgument, MissingDependency

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks slim`."""

    model: Model = ""
    flops: float | None = None
    """Share of the floating-point operations to keep, in (0, 1)."""
    params: float | None = None
    """Share of the parameters to keep."""
    latency: float | None = None
    """Share of the time per call to keep, measured on this machine."""
    method: str = "group-norm"
    """Registered method: a score, or one that trains towards a cut (`sparseworks methods`)."""
    plugin: Plugins = ()
    data: str | None = None
    """Calibration, or what a method trains on; example: docstrings, digits, a text or parquet file,
    an image folder, file.py:batches."""
    epochs: int | None = None
    """Passes over the data, of methods that train."""
    augment: bool = True
    """Random crops and flips of images that are trained on."""
    input_shape: tuple[int, ...] = ()
    """Shape of a random example (8 3 32 32) where there is no data; CIFAR ResNets need none."""
    samples: int | None = None
    """Calibration samples (default 128), or images to train on (default all)."""
    length: Length = 128
    batch_size: int = 8
    """Samples per batch; also of the example that is timed."""
    include: tuple[str, ...] = ()
    """Name patterns; only groups that touch one of these parameters."""
    exclude: tuple[str, ...] = ()
    """Name patterns; no group that touches one of these parameters."""
    round_to: str | None = None
    """Every width that changes becomes a multiple of this (8); auto: of 1, 8, 16 the fastest here;
    for some layers: layer2=16,layer3=8."""
    floor: float = 0.1
    """Share of every width that stays at least."""
    per_layer: bool = False
    """Widths per layer also for Hugging Face models; load_slim reads the result."""
    streams: bool = False
    """Also cut residual streams under layer norm."""
    blocks: bool = False
    """Drop whole residual blocks where widths at their floor leave more than the target."""
    iterations: int = 1
    """Rounds of equal relative size, scored anew."""
    groups: bool = False
    """Print what would have to go together, and cut nothing."""
    option: MethodOptions = ()
    seed: int = 0
    """Of calibration sampling."""
    onnx: bool = False
    """Export to ONNX and time onnxruntime before and after."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force."""
    force: bool = False
    """Replace the output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Trace, cut, time before and after, save."""
    import sparseworks as sw
    from sparseworks.cli.loading import load_model
    from sparseworks.cli.preparing import check_inputs, check_output
    from sparseworks.cli.prune import command_of
    from sparseworks.cli.running import plain_options, progress_bar
    from sparseworks.cli.subjects import subject
    from sparseworks.cli.values import parse_options
    from sparseworks.core import registry
    from sparseworks.diagnostics.claims import machine
    from sparseworks.models.coupling import trace
    from sparseworks.weights.structured import latency

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks slim minilm --flops 0.6")
    check_output(options.out, options.force)
    check_inputs(options)
    extra = parse_options(options.option)
    method = registry.build(options.method, ("structured", "train-and-cut", "whole-model"), **extra)
    if method.info.kind == "train-and-cut" and (options.data is None or options.epochs is None):
        raise InvalidArgument(f"{options.method} trains before it cuts: give --data and --epochs")
    round_to = _multiples(options.round_to)
    loaded = load_model(options.model)
    example, batches = subject(loaded, options, method)
    if options.groups:
        print(trace(loaded.model, example))
        return {"model": loaded.name}
    before = latency(loaded.model, example)
    with tempfile.TemporaryDirectory() as place:
        times = {"torch": [before], **_onnx(options, loaded.model, example, Path(place))}
        with progress_bar("slimming", quiet=options.json) as progress:
            given: dict[str, Any] = {
                "flops": options.flops,
                "params": options.params,
                "latency": options.latency,
                "method": options.method,
                "data": batches,
                "epochs": options.epochs,
                "include": options.include or None,
                "exclude": options.exclude or None,
                "round_to": round_to,
                "floor": options.floor,
                "uniform": False if options.per_layer else None,
                "streams": options.streams,
                "blocks": options.blocks,
                "iterations": options.iterations,
            }
            result = sw.slim(loaded.model, example, progress=progress, **{**given, **extra})
        times["torch"].append(latency(loaded.model, example))
        for name, value in _onnx(options, loaded.model, example, Path(place)).items():
            times[name] += value
        summary = {
            "command": command_of(options, "slim"),
            "machine": machine(),
            "options": plain_options(options),
            "model": loaded.name,
            "class": type(loaded.model).__name__,
            "seconds per call": times,
            "result": result.to_dict(),
        }
        if options.out is not None:
            _write(options, loaded, result, summary, Path(place))
    _show(summary, result, options)
    return summary


def _multiples(text: str | None) -> int | Literal["auto"] | dict[str, int] | None:
    """What `--round-to` says: a number, "auto", or pattern=number,..."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        if "=" not in text:
            return int(text)
        pairs = (part.rpartition("=") for part in text.split(","))
        return {pattern.strip(): int(number) for pattern, _, number in pairs}
    except ValueError:
        raise InvalidArgument(
            f"--round-to {text}: a number, auto, or name patterns with numbers (layer2=16,layer3=8)"
        ) from None


def _onnx(options: Options, model: Any, example: Any, place: Path) -> dict[str, list[float]]:
    if not options.onnx:
        return {}
    from sparseworks.weights.structured import export_onnx, onnx_latency

    path = export_onnx(model, example, place / "model.onnx")
    return {"onnxruntime": [onnx_latency(path, example)]}


def _write(
    options: Options, loaded: Any, result: Any, summary: dict[str, Any], place: Path
) -> None:
    """Model, result and options in one new folder, or nothing at all."""
    from sparseworks.cli.running import plain_options, write_json
    from sparseworks.io.atomic import replaced_folder
    from sparseworks.report.slim import write_slim
    from sparseworks.weights.structured import save_slim

    out = options.out
    assert out is not None
    with replaced_folder(out) as made:
        if result.config is not None:
            loaded.model.save_pretrained(made / "model")
        else:
            save_slim(result, made / "model")
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(made / "model")
        if options.onnx:
            shutil.copy(place / "model.onnx", made / "model.onnx")
        write_json(made / "result.json", summary)
        write_json(made / "options.json", plain_options(options))
        with contextlib.suppress(MissingDependency):
            write_slim(made / "report.html", summary)


def _show(summary: dict[str, Any], result: Any, options: Options) -> None:
    if options.json:
        import json

        print(json.dumps(summary, indent=1, default=str))
        return
    print(result)
    for name, (before, after) in summary["seconds per call"].items():
        ratio = before / after
        print(f"  {name}: {before * 1e3:.2f} -> {after * 1e3:.2f} ms a call ({ratio:.2f}x)")
    if options.out is not None:
        how = "from_pretrained" if result.config is not None else "load_slim"
        print(f"wrote {options.out}; {how} reads {options.out / 'model'}")
