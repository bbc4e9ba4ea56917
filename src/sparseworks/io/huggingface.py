"""`sparseworks.from_pretrained`: build a model from any Hugging Face folder, sparse or dense."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import CheckpointError, InvalidArgument, MissingDependency
from sparseworks.core.masks import attach, masks
from sparseworks.core.types import Progress
from sparseworks.io.checkpoint import Checkpoint
from sparseworks.io.loading import fill
from sparseworks.io.masks_beside import read_beside
from sparseworks.io.opening import PACKED_NAME, open_checkpoint
from sparseworks.io.packed import PackedCheckpoint
from sparseworks.io.plain import read_json
from sparseworks.io.sealed import note_edits

__all__ = ["class_of", "from_pretrained", "without_weights"]

_HUB_FILES = ["*.json", "*.txt", "*.jinja", "*.model", PACKED_NAME, "model*.safetensors"]
_LOCK = threading.Lock()


@torch.no_grad()
def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    model_class: type[nn.Module] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    infer_masks: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    **config_options: Any,
) -> Any:
    """Build a transformers model with its weights and mask record.

    Reads folders written by `save`, dense folders (sharded too; with the masks that `prune_folder`
    puts beside the weights, where the weights still obey them), and compressed-tensors folders of
    format "sparse-bitmask" or "sparse-24-bitmask". Packed weights go straight into a model built
    without weights, so memory holds one model and random initialisation costs nothing.

    Args:
        folder: a folder here, or the name of a model on the hub.
        model_class: transformers class; None: the one that config.json names.
        dtype: convert the weights; None: as stored (dense folders: as config.json says).
        device: move the model there at the end.
        infer_masks: for checkpoints without a mask record: take the zeros of the prunable weights
            as masked (see `sparseworks.io.infer_masks`).
        revision: of a hub model.
        progress: called with (tensors done, tensors in all, name).
        **config_options: override entries of config.json (attn_implementation="eager", say).

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: nothing there, damaged, a pickle, or tensors missing.
        MissingDependency: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency(
            "from_pretrained needs transformers; install sparseworks[hf]"
        ) from (error)
    path = _find(folder, revision)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no config.json, so no model can be built; build it and use sparseworks.load"
        )
    written = read_json(path / "config.json")
    _note_edits(path, written.get("sparseworks"))
    config_options.setdefault("trust_remote_code", False)  # else transformers asks at a prompt
    try:
        config = transformers.AutoConfig.from_pretrained(path, **config_options)
    except Exception as error:  # whatever its class meets there
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    with open_checkpoint(path) as checkpoint:
        cls = model_class or class_of(transformers, path, config)
        if isinstance(checkpoint, PackedCheckpoint):
            model = _from_packed(cls, config, checkpoint, progress)
            _read_generation_config(transformers, path, model)
        else:
            model = _through_transformers(cls, config, path, checkpoint, written, dtype)
            attach(model, read_beside(path, model))
    model.config.__dict__.pop("sparseworks", None)
    model.config._name_or_path = str(folder)
    model.name_or_path = str(folder)
    if infer_masks and masks(model) is None:
        from sparseworks.io.zeros import infer_masks as infer

        attach(model, infer(model))
    if dtype is not None:
        _convert(model, dtype)
    if device is not None:
        model.to(device)
    return model.eval()


def _note_edits(path: Path, note: Any) -> None:
    """Warn of configs that are not as `save` wrote them."""
    if note is None and (path / PACKED_NAME).is_file():
        note_edits(path / "config.json", {}, "")  # the note that `save` wrote is gone
    seals = note.get("crc32") if isinstance(note, dict) else None
    for name, seal in (seals if isinstance(seals, dict) else {}).items():
        if Path(name).name == name and (path / name).is_file():
            found = {k: v for k, v in read_json(path / name).items() if k != "sparseworks"}
            note_edits(path / name, found, seal)


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Convert what the checkpoint holds; buffers made by the modules keep their precision."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _find(folder: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder of a path or a hub name."""
    path = Path(folder)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; give its folder, or use sparseworks.load")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(folder)):
        raise CheckpointError(f"{path}: no such folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}: no such folder, and the hub did not give it: {reason}"
        ) from error


def class_of(transformers: Any, path: Path, config: Any) -> Any:
    """The transformers class that a config names."""
    names = getattr(config, "architectures", None) or []
    if not names:
        return transformers.AutoModel
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise InvalidArgument(
            f"{path}: transformers has no class {names[0]!r}; give it as model_class="
        )
    return cls


def _from_packed(cls: Any, config: Any, checkpoint: Checkpoint, progress: Progress | None) -> Any:
    if cls.__module__.startswith("transformers.models.auto"):
        cls = cls._model_mapping[type(config)]
    dtype = getattr(config, "dtype", None)
    try:
        with without_weights(dtype if isinstance(dtype, torch.dtype) else None):
            model = cls(config)
    except Exception as error:  # whatever the class meets in its config
        file = checkpoint.path.parent / "config.json"
        raise CheckpointError(f"{file}: no {cls.__name__} can be built of it ({error})") from error
    fill(model, checkpoint, progress)
    left = [n for n, p in model.named_parameters() if p.is_meta]
    if left:
        raise CheckpointError(f"{checkpoint.path}: tensor {left[0]!r} of the model is missing")
    return model


@contextlib.contextmanager
def without_weights(dtype: torch.dtype | None) -> Iterator[None]:
    """Modules built here have their parameters on the meta device, their buffers as usual.

    Buffers that are not in the state dict (rotary frequencies, masks) are computed when a module
    is built, so they must be real.
    """
    register = nn.Module.register_parameter

    def register_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    before = torch.get_default_dtype()
    with _LOCK, torch.random.fork_rng(devices=[]):
        nn.Module.register_parameter = register_meta  # type: ignore[method-assign,assignment]
        try:
            if dtype is not None and dtype.is_floating_point:
                torch.set_default_dtype(dtype)
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
            torch.set_default_dtype(before)


def _read_generation_config(transformers: Any, path: Path, model: Any) -> None:
    if model.can_generate() and (path / "generation_config.json").is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
        except Exception as error:  # whatever its class meets there
            raise CheckpointError(f"{path / 'generation_config.json'}: {error}") from error


def _through_transformers(
    cls: Any,
    config: Any,
    path: Path,
    checkpoint: Checkpoint,
    written: dict[str, Any],
    dtype: torch.dtype | None,
) -> Any:
    """Others' folders, with all the renaming that transformers knows; nothing may be missing."""
    options: dict[str, Any] = {"dtype": dtype or getattr(config, "dtype", None) or "auto"}
    if cls.__module__.startswith("transformers.models.auto"):
        cls = cls._model_mapping[type(config)]
    quantized = written.get("quantization_config") or written.get("compression_config") or {}
    if quantized and ("sparsity_config" not in quantized or quantized.get("config_groups")):
        raise CheckpointError(
            f"{path}: the weights are quantized ({quantized.get('quant_method')}); only "
            "unquantized models are read"
        )
    for key in ("quantization_config", "compression_config", "sparsity_config"):
        config.__dict__.pop(key, None)
    if checkpoint.kind == "compressed-tensors":
        for name in checkpoint.tensors:
            checkpoint.verify(name)
        state = {name: checkpoint.read(name) for name in checkpoint.tensors}
        model, report = cls.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )
    else:
        try:
            model, report = cls.from_pretrained(
                path, config=config, use_safetensors=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    for key, what in (("missing_keys", "is missing"), ("mismatched_keys", "has another shape")):
        if names := sorted(str(k[0] if isinstance(k, tuple) else k) for k in report.get(key, ())):
            raise CheckpointError(
                f"{path}: tensor {names[0]!r} of {cls.__name__} {what} in the checkpoint"
            )
    return model
