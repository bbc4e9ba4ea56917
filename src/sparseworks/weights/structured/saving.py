"""Slimmed models whose widths differ per layer: a folder with the weights and the new shapes.

    result = slim(model, example, flops=0.5, uniform=False)
    save_slim(result, "small")
    model = load_slim("small")                 # Hugging Face models
    model = load_slim("small", MyModel())      # any other: a fresh model of the old shapes

Uniform Hugging Face models need none of this: `model.save_pretrained` and `from_pretrained` do.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.core.types import PruneResult
from sparseworks.io.atomic import replaced_folder
from sparseworks.io.plain import read_json
from sparseworks.io.sealed import note_edits, sealed, text_seal, unsealed
from sparseworks.models.recurrence import relist
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.configs import has_config
from sparseworks.weights.structured.depth import drop
from sparseworks.weights.structured.materialising import plain_layer, replace_layer
from sparseworks.weights.structured.result import SlimResult
from sparseworks.weights.structured.sliced import PARTS, slice_layer, sliced_layers

__all__ = ["load_slim", "save_slim"]

_RECORD = "slim.json"
_WEIGHTS = "model.safetensors"


def save_slim(result: SlimResult | PruneResult, folder: str | Path) -> Path:
    """Write a slimmed model to a folder (a temporary one first), with its shapes.

    Of `prune` only results with `changes` need it: methods that cut shapes before weights.
    """
    from sparseworks.io import save

    folder = Path(folder)
    if folder.exists() and not (folder / _RECORD).exists() and any(folder.iterdir()):
        raise InvalidArgument(f"{folder} exists and holds something else; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = result.model
    tensors: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    record = {
        "format": "sparseworks-slim",
        "version": 1,
        "class": type(model).__name__,
        "shapes": {n: list(t.shape) for n, t in tensors.items()},
        "plain": list(getattr(result, "plain", ())),
        "blocks": []
        if has_config(model)
        else list(getattr(result, "blocks", ())),  # a config tells its own depth
        "sliced": sliced_layers(model),
        "attributes": [[c.module, c.attribute, _plain(c.after)] for c in result.changes],
    }
    with replaced_folder(folder) as part:
        if has_config(model):
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(part)
            record["config"] = text_seal(json.loads((part / "config.json").read_text()))
        save(model, part / _WEIGHTS)
        (part / _RECORD).write_text(json.dumps(sealed(record), indent=1))
    return folder


def load_slim(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model of `save_slim`, in evaluation mode.

    Args:
        folder: what `save_slim` wrote.
        model: a model of the shapes before slimming; Hugging Face models are built from the
            folder's config when it is left out.

    Raises:
        CheckpointError: no such record, or one that does not fit the model.
    """
    from sparseworks.io import load

    folder = Path(folder)
    try:
        record = unsealed(json.loads((folder / _RECORD).read_text()))
        if record.get("format") != "sparseworks-slim" or record.get("version") != 1:
            raise ValueError("unknown format or version")
        shapes = {str(n): tuple(int(x) for x in s) for n, s in record["shapes"].items()}
        attributes = [(str(m), str(a), v) for m, a, v in record["attributes"]]
        plain = [str(p) for p in record.get("plain", [])]
        gone = [str(b) for b in record.get("blocks", [])]
        sliced = [str(b) for b in record.get("sliced", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no readable {_RECORD} ({error})") from error
    if model is None:
        model = _built(folder, record.get("config"))
    for path in plain:
        _make_plain(model, path, folder)
    for block in gone:
        container, _, index = block.rpartition(".")
        try:
            drop(model, container, int(index), Backup())
        except (InvalidArgument, ValueError) as error:
            raise CheckpointError(f"{folder} is of another model: no block {block}") from error
    for layer in sliced:
        _make_sliced(model, layer, shapes, folder)
    _resize(model, shapes, attributes, folder)
    load(folder / _WEIGHTS, model)
    return model.eval()


def _built(folder: Path, seal: Any) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise InvalidArgument("give load_slim the model, of its shapes before slimming") from error
    if not (folder / "config.json").exists():
        raise InvalidArgument(f"{folder} has no config.json: give load_slim the unslimmed model")
    note_edits(folder / "config.json", read_json(folder / "config.json"), seal)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        name = (config.architectures or [""])[0]
        if not hasattr(transformers, name):
            raise CheckpointError(f"{folder}: transformers has no class {name!r}")
        built: nn.Module = getattr(transformers, name)(config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a class of transformers meets in a config
        raise CheckpointError(
            f"{folder / 'config.json'}: no model can be built of it ({error})"
        ) from error
    return built


def _make_plain(model: nn.Module, path: str, folder: Path) -> None:
    try:
        layer = plain_layer(model.get_submodule(path))
    except AttributeError:
        layer = None
    if layer is None:
        raise CheckpointError(f"{folder} is of another model: no Linear or convolution {path}")
    replace_layer(model, path, layer, Backup())


def _make_sliced(
    model: nn.Module, path: str, shapes: dict[str, tuple[int, ...]], folder: Path
) -> None:
    try:
        layer = model.get_submodule(path)
        shortcuts = [
            torch.empty(shapes[f"{path}.{n}"]) for n in ("attention_shortcut", "mlp_shortcut")
        ]
        if not all(hasattr(layer, part) for part in PARTS):
            raise KeyError(path)
    except (AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder} is of another model: no layer {path} to slice") from error
    slice_layer(layer, *shortcuts)


def _resize(
    model: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    attributes: list[tuple[str, str, Any]],
    folder: Path,
) -> None:
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if missing := sorted(shapes.keys() - known.keys()):
        raise CheckpointError(f"{folder} is of another model: it has no {missing[0]}")
    new: dict[int, torch.Tensor] = {}
    for name, shape in shapes.items():
        old = known[name]
        if len(shape) != old.ndim or any(a > b for a, b in zip(shape, old.shape)):
            raise CheckpointError(
                f"{folder}: {name} is {list(shape)}, not a cut of the model's {list(old.shape)}"
            )
        if tuple(old.shape) != shape:
            new[id(old)] = old.detach()[tuple(slice(0, n) for n in shape)].clone()
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in new:
                    value = new[id(tensor)]
                    if isinstance(tensor, nn.Parameter) and not isinstance(value, nn.Parameter):
                        value = new[id(tensor)] = nn.Parameter(value, tensor.requires_grad)
                    table[name] = value  # type: ignore[assignment]
    for path, attribute, value in attributes:
        try:
            module = model.get_submodule(path)
            old = getattr(module, attribute)
        except AttributeError as error:
            raise CheckpointError(f"{folder}: the model has no {path}.{attribute}") from error
        setattr(module, attribute, tuple(value) if isinstance(old, tuple) else value)
    relist(model.modules())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
