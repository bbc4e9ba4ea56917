"""Make a sparse model skip its zeros: measure the ways to run it, explain, save the plan.

The plan is one file; `sparseworks.load_compiled` reads it in well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseworks.cli.fields import Model
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks compile`."""

    model: Model = ""
    weights: Path | None = None
    """A checkpoint that `sparseworks prune` wrote, loaded into the model."""
    activations: Path | None = None
    """Of a causal language model: thresholds that `sparseworks activations` wrote."""
    batch: int = 1
    """Samples of the example on which the ways are measured."""
    tokens: int = 128
    """Tokens of each text of the example."""
    input_shape: tuple[int, ...] = ()
    """Shape of one sample (3 224 224) where the model does not tell."""
    dtype: str | None = None
    """fp32 (the default), or bf16 or int8: products may round to that where it is faster. Of a
    causal language model, what its weights are kept in: bf16 (the default), int8, int4 or fp32."""
    head: str | None = None
    """Of a causal language model: the dtype of its output head."""
    cache: str = "fp16"
    """Of a causal language model: the dtype of keys and values."""
    threads: int | None = None
    """Of the native kernels; as many as torch uses where not given."""
    out: Path | None = None
    """File for the plan. Where torch is faster than every program there is none: that is said, no
    file is written, and the command ends with code 1."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Compile, explain, save."""
    import sparseworks as sw
    from sparseworks.cli.examples import random_example
    from sparseworks.cli.loading import load_model, parse_precision
    from sparseworks.cli.preparing import check_inputs, check_output

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks compile minilm")
    check_output(options.out, force=True)
    check_inputs(options)
    loaded = load_model(options.model)
    if options.weights is not None:
        sw.load(options.weights, loaded.model)
    if loaded.kind == "causal":
        if options.activations is not None:
            sw.load_activations(options.activations, loaded.model)
        return _decoder(options, loaded)
    if options.activations is not None:
        raise InvalidArgument("--activations is for causal language models")
    example = random_example(
        loaded, options.batch, tokens=options.tokens, input_shape=options.input_shape
    )
    dtype = parse_precision(options.dtype or "fp32")
    compiled = sw.compile(loaded.model, example, dtype=dtype, threads=options.threads)
    written = None if compiled.plan is None else options.out
    if written is not None:
        compiled.save(written)
    result = {
        "model": loaded.name,
        "kind": compiled.kind,
        "milliseconds": compiled.times,
        "error": compiled.error,
        "notes": compiled.notes,
        "out": None if written is None else str(written),
    }
    if options.json:
        import json

        print(json.dumps(result, indent=1))
    else:
        print(compiled.explain())
    if options.out is not None and written is None:
        compiled.save(options.out)  # says why there is nothing to write
    if written is not None and not options.json:
        print(f"wrote {written}; sparseworks.load_compiled({str(written)!r}) reads it")
    return result


def _decoder(options: Options, loaded: Any) -> dict[str, Any]:
    """A causal language model as a decoder."""
    import sparseworks as sw

    decoder = sw.compile_decoder(
        loaded.model, dtype=options.dtype or "bf16", head=options.head, cache=options.cache,
        threads=options.threads,
    )  # fmt: skip
    report = getattr(decoder, "report", None)
    written = None if report is None else options.out
    if written is not None:
        decoder.save(written)
    result = {
        "model": loaded.name, "kind": "layers" if report is None else "decoder",
        "bytes": None if report is None else report.nbytes,
        "notes": decoder.notes if report is None else report.notes,
        "out": None if written is None else str(written),
    }  # fmt: skip
    if options.json:
        import json

        print(json.dumps(result, indent=1))
    else:
        print(decoder.explain())
    if options.out is not None and written is None:
        decoder.save(options.out)  # says why there is nothing to write
    if written is not None and not options.json:
        print(f"wrote {written}; sparseworks.load_decoder({str(written)!r}) reads it, and "
              f"sparseworks generate {written} --prompt ...")  # fmt: skip
    return result
