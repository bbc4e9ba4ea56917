"""Write a model as other runtimes read it: zeros stay zeros, stored like any other weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparseworks.cli.fields import Model
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks export`."""

    model: Model = ""
    to: Literal["dense", "gguf", "onnx", "pack-quantized", "int-quantized"] = "dense"
    """dense: as transformers writes it (any model: a file, where --out ends in .safetensors); gguf:
    for llama.cpp; onnx: any model, for the sizes of an example; pack-quantized, int-quantized:
    Linear weights as integers, for what reads compressed-tensors."""
    weights: Path | None = None
    """A checkpoint that `sparseworks prune` wrote, loaded into the model."""
    bits: int | None = None
    """Of pack-quantized, 4 or 8; default 4."""
    group: int | None = None
    """Of pack-quantized: columns that share a scale, 0 for a row; default 128."""
    type: str = "F16"
    """Of the matrices of gguf: F32, F16, BF16, Q8_0 or Q4_0."""
    head: str | None = None
    """Of the output head of gguf; as --type where not given."""
    batch: int = 1
    """Samples of the example of onnx."""
    tokens: int = 128
    """Of each text in it."""
    input_shape: tuple[int, ...] = ()
    """Of one sample in it, for models that do not tell."""
    dtype: str | None = None
    """fp32, bf16 or fp16, of what stays floating; default: as stored."""
    out: Path | None = None
    """Folder (gguf, onnx: file) to write; it must not exist yet."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Load, write, say what was written."""
    import sparseworks as sw
    from sparseworks.cli.loading import load_model
    from sparseworks.cli.preparing import check_inputs, check_output

    if not options.model or options.out is None:
        raise InvalidArgument(
            "give a model and --out; for example: sparseworks export ./pruned --out ./plain"
        )
    quantized = options.to in ("pack-quantized", "int-quantized")
    if not quantized and (options.bits is not None or options.group is not None):
        raise InvalidArgument(f"--bits and --group are of integers; --to {options.to} has none")
    if options.to != "gguf" and (options.type != "F16" or options.head is not None):
        raise InvalidArgument(f"--type and --head are of gguf, not of --to {options.to}")
    check_output(options.out, False)
    check_inputs(options)
    loaded = load_model(options.model, options.dtype or _stored(options.model))
    if options.weights is not None:
        sw.load(options.weights, loaded.model)
    result = {
        "model": loaded.name, "to": options.to, "out": str(options.out),
        **_write(options, loaded, options.out),
    }  # fmt: skip
    if options.json:
        import json

        print(json.dumps(result, indent=1))
        return result
    _show(result)
    return result


def _stored(name: str) -> str | None:
    """The dtype on disk of a folder, where it is one that models have."""
    from sparseworks.io.plain import read_json

    config = Path(name) / "config.json"
    found = read_json(config) if config.is_file() else {}
    dtype = str(found.get("dtype") or found.get("torch_dtype"))
    return dtype if dtype in ("float32", "bfloat16", "float16") else None


def _write(options: Options, loaded: Any, out: Path) -> dict[str, Any]:
    from sparseworks.cli.examples import random_example
    from sparseworks.io import export_dense, export_quantized
    from sparseworks.io.gguf import export_gguf
    from sparseworks.io.onnx import export_onnx

    if options.to == "gguf":
        export_gguf(loaded.model, out, options.type, options.head)
        return {"bytes": out.stat().st_size}
    if options.to == "onnx":
        shape = options.input_shape
        example = random_example(loaded, options.batch, tokens=options.tokens, input_shape=shape)
        export_onnx(loaded.model, example, out)
        return {"bytes": sum(f.stat().st_size for f in out.parent.glob(f"{out.name}*"))}
    if options.to == "dense":
        single = out.suffix == ".safetensors"
        export_dense(loaded.model, out, tokenizer=None if single else loaded.tokenizer)
        files = [out] if single else out.glob("*.safetensors")
        return {"bytes": sum(f.stat().st_size for f in files)}
    done = export_quantized(
        loaded.model, out, options.to, bits=options.bits, group=options.group,
        tokenizer=loaded.tokenizer,
    )  # fmt: skip
    return {"bytes": done.bytes, "tensors": list(done.tensors), "skipped": done.skipped}


def _show(result: dict[str, Any]) -> None:
    from sparseworks.core.types import dense_lines
    from sparseworks.report.text import megabytes

    if "tensors" in result:
        print(f"{len(result['tensors'])} weights are integers")
        for line in dense_lines(result["skipped"], "not rounded"):
            print(line.strip())
    print(f"wrote {result['out']}, {megabytes(result['bytes'])}")
