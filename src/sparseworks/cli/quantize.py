"""Turn the weights of a trained model into integers, save them losslessly, and say what it cost.

The output folder holds the packed checkpoint, whose integers `sparseworks generate` packs as they
are, result.json, and options.json, which `--config` accepts to repeat the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Options of `sparseworks quantize`."""

    model: Model = ""
    method: str = "rounding"
    """Registered method of kind quantization; `sparseworks methods` lists them."""
    plugin: Plugins = ()
    bits: float | None = None
    """Of a code (a mean, for methods of mixed precision); default: the method's."""
    group: int | None = None
    """Columns that share a scale; default: the method's."""
    data: Data = None
    samples: Samples = 128
    length: Length = 256
    batch_size: BatchSize = 8
    metric: Metrics = ()
    eval_data: EvalData = None
    eval_samples: EvalSamples = None
    include: tuple[str, ...] = ()
    """Name patterns of the only weights to quantize."""
    exclude: tuple[str, ...] = ()
    """Name patterns of weights to leave as they are."""
    option: MethodOptions = ()
    seed: int = 0
    """Of calibration sampling and of the order of training."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force."""
    force: bool = False
    """Replace the output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Measure, quantize, measure, save."""
    import sparseworks as sw
    from sparseworks.cli.loading import default_metrics, load_model
    from sparseworks.cli.preparing import calibration, check_inputs, check_output, make_metrics
    from sparseworks.cli.prune import command_of, show, summarize
    from sparseworks.cli.running import progress_bar
    from sparseworks.cli.values import parse_options
    from sparseworks.core import registry

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks quantize ./llama --out q")
    given: dict[str, Any] = parse_options(options.option)
    if options.bits is not None:
        whole = options.bits == int(options.bits)
        given["bits"] = int(options.bits) if whole else options.bits
    if options.group is not None:
        given["group"] = options.group
    registry.build(options.method, ("quantization",), **given)
    check_output(options.out, options.force)
    check_inputs(options)
    loaded = load_model(options.model, None)
    names = options.metric or default_metrics(loaded, options.eval_data)
    batches = calibration(loaded, options)
    metrics = make_metrics(names, loaded, options.eval_data, options.eval_samples)
    before = {m.name: m(loaded.model) for m in metrics}
    with progress_bar("quantizing", quiet=options.json) as progress:
        result = sw.quantize(
            loaded.model, options.method, data=batches, include=options.include or None,
            exclude=options.exclude or None, seed=options.seed, progress=progress, **given,
        )  # fmt: skip
    after = {m.name: m(loaded.model) for m in metrics}
    summary = summarize(options, loaded, result, metrics, before, after)
    summary["command"] = command_of(options, "quantize")
    if options.out is not None:
        _write(options, loaded, summary)
    show(summary, options.json)
    if not options.json:
        bits = summary["result"]["bits_per_weight"]
        print(f"{bits:.3f} bits a weight of the quantized tensors, scales and zeros included")
    return summary


def _write(options: Options, loaded: Any, summary: dict[str, Any]) -> None:
    """Checkpoint and result in one new folder, or nothing at all."""
    from sparseworks.cli.running import plain_options, write_json
    from sparseworks.io import save
    from sparseworks.io.atomic import replaced_folder

    assert options.out is not None
    with replaced_folder(options.out) as made:
        folder = hasattr(loaded.model, "config") and hasattr(loaded.model, "save_pretrained")
        target = made / ("checkpoint" if folder else "model.safetensors")
        info = save(loaded.model, target, tokenizer=loaded.tokenizer if folder else None)
        summary["file_bytes"] = info.file_bytes
        summary["checkpoint"] = str(options.out / target.name)
        write_json(made / "result.json", summary)
        write_json(made / "options.json", plain_options(options))
