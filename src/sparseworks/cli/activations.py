"""Make the activations of a trained model sparse, token by token, and say what that cost.

The output file holds the thresholds alone; `sparseworks compile MODEL --activations FILE` makes a
decoder of a language model that reads only the weights of active inputs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.cli.fields import (
    BatchSize,
    EvalData,
    EvalSamples,
    Length,
    MethodOptions,
    Metrics,
    Samples,
)
from sparseworks.cli.plugins import Plugins
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks activations`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """Hugging Face folder or hub name, `minilm`, file.py:factory."""
    method: str = "wina"
    """teal, wina, r-sparse, cats, chess, spark, ...; `sparseworks methods` describes them."""
    plugin: Plugins = ()
    sparsity: float = 0.5
    """Share of the entries that is set to 0, in [0, 1)."""
    allocation: str = "uniform"
    """uniform, or greedy: layer by layer where it costs a block least."""
    data: str | None = None
    """Calibration: docstrings, sources, a text or parquet file, a folder."""
    samples: Samples = 8
    length: Length = 256
    batch_size: BatchSize = 4
    tokens: int = 4096
    """Calibration tokens that are looked at in each layer."""
    metric: Metrics = ()
    eval_data: EvalData = None
    eval_samples: EvalSamples = None
    include: tuple[str, ...] = ()
    """Name patterns of the only layers to take part."""
    exclude: tuple[str, ...] = ()
    """Name patterns of layers to leave as they are."""
    option: MethodOptions = ()
    weights: Path | None = None
    """A checkpoint that `sparseworks prune` wrote, loaded into the model."""
    seed: int = 0
    """Of calibration sampling."""
    dtype: str | None = None
    """fp32, bf16 or fp16; default fp32."""
    out: Path | None = None
    """File for the thresholds (.safetensors)."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Calibrate, measure before and after, save."""
    import sparseworks as sw
    from sparseworks.cli.loading import default_metrics, load_model
    from sparseworks.cli.preparing import calibration, check_inputs, check_output, make_metrics
    from sparseworks.cli.running import progress_bar
    from sparseworks.cli.values import parse_options
    from sparseworks.core import registry

    if not options.model:
        raise InvalidArgument(
            "no model given; for example: sparseworks activations ./llama --method wina"
        )
    registry.build(options.method, **parse_options(options.option))
    check_output(options.out, force=True)
    check_inputs(options)
    loaded = load_model(options.model, options.dtype)
    if options.weights is not None:
        sw.load(options.weights, loaded.model)
    names = options.metric or default_metrics(loaded, options.eval_data)
    batches = calibration(loaded, options)
    metrics = make_metrics(names, loaded, options.eval_data, options.eval_samples)
    before = {m.name: m(loaded.model) for m in metrics}
    with progress_bar("calibrating", quiet=options.json) as progress:
        made = sw.sparse_activations(
            loaded.model,
            options.method,
            sparsity=options.sparsity,
            data=batches,
            allocation=options.allocation,
            include=options.include or None,
            exclude=options.exclude or None,
            tokens=options.tokens,
            progress=progress,
            **parse_options(options.option),
        )
    made.reset()
    after = {m.name: m(loaded.model) for m in metrics}
    if options.out is not None:
        made.save(options.out)
    result = {
        "model": loaded.name,
        "method": made.method,
        "options": made.options,
        "density": made.density,
        "layers": [asdict(x) for x in made.layers()],
        "metrics": {m.name: {"before": before[m.name], "after": after[m.name]} for m in metrics},
        "out": None if options.out is None else str(options.out),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return result
    print(made)
    for m in metrics:
        print(f"{m.name}: {before[m.name]:.4g} before, {after[m.name]:.4g} with the gates")
    if options.out is not None:
        again = f"sparseworks compile {options.model} --activations {options.out}"
        print(f"wrote {options.out}; for a decoder that reads less: {again}")
    return result
