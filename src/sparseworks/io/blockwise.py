"""A transformers model in a folder of shards, of which memory holds one block at a time.

The model is built without weights. A *unit* is what is read, changed and written at once: a block
(a child of its outermost lists of modules), or any other module that owns parameters. Names on
disk become those of the model, and back, by the rules that transformers itself loads and saves
with (experts one by one on disk and one bank in memory, say), applied to one unit.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import CheckpointError, InvalidArgument, MissingDependency
from sparseworks.io.huggingface import class_of, without_weights
from sparseworks.io.opening import open_checkpoint
from sparseworks.io.plain import PlainCheckpoint, read_json

__all__ = ["BlockwiseModel"]


class BlockwiseModel:
    """Weights come and go; everything else of the model is there.

    Args:
        folder: of a transformers model: config.json and dense safetensors, one file or shards.
        dtype: convert the weights as they are read; None: as config.json says, else as stored.

    Attributes:
        model: in eval mode; parameters of blocks that are not held are on the meta device.
        units: unit -> names of its tensors, in the order of the model.
        blocks: the units that are blocks; all others are held from the start, as maps of the
            files where no conversion is asked for.

    Raises:
        CheckpointError: not such a folder, or tensors missing or of other shapes.
        MissingDependency: transformers is not installed.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        try:
            import transformers
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError as error:
            raise MissingDependency(
                "a model is read block by block through transformers; install sparseworks[hf]"
            ) from error
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json, so no model can be built")
        written = read_json(folder / "config.json")
        if written.get("quantization_config") or written.get("compression_config"):
            raise CheckpointError(f"{folder}: the weights are quantized; only dense ones are read")
        checkpoint = open_checkpoint(folder)
        if not isinstance(checkpoint, PlainCheckpoint):
            raise CheckpointError(
                f"{folder}: holds a {checkpoint.kind} checkpoint; only dense safetensors are read "
                "block by block (sparseworks.from_pretrained and export_dense write them)"
            )
        self.source = checkpoint
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        stored = {t.dtype for t in checkpoint.tensors.values() if t.dtype.is_floating_point}
        asked = dtype or getattr(config, "dtype", None)
        self.dtype = asked if isinstance(asked, torch.dtype) else max(stored, key=_width)
        cls = class_of(transformers, folder, config)
        if cls.__module__.startswith("transformers.models.auto"):
            cls = cls._model_mapping[type(config)]
        with without_weights(self.dtype):
            self.model: Any = cls(config).eval()
        self.model.config.dtype = self.dtype
        self.model.config._name_or_path = self.model.name_or_path = str(folder)
        self._rules: Any = get_model_conversion_mapping(self.model)
        self._check()
        self.blocks = _blocks(self.model)
        self.units = self._units()
        self._keys = self._sources(self.source)
        self.held: set[str] = set()

    def _check(self) -> None:
        """All tensors by their headers; the model's own then have the dtypes they will have."""
        empty = {
            name: torch.empty(t.shape, dtype=t.dtype, device="meta")
            for name, t in self.source.tensors.items()
        }
        report = self._convert(empty, "meta")
        self.model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
        made = {n for n, b in self.model.named_buffers()}
        wrong = {
            "is missing": sorted(set(report.missing_keys) - made),
            "has another shape": sorted(k[0] for k in report.mismatched_keys),
            "cannot be converted": sorted(report.conversion_errors),
        }
        for what, names in wrong.items():
            if names:
                raise CheckpointError(
                    f"{self.folder}: tensor {names[0]!r} of {type(self.model).__name__} {what}"
                )

    def _convert(self, state: dict[str, Tensor], device: str) -> Any:
        """Put tensors by their names on disk into the model."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        plan = self.model._get_dtype_plan(self.dtype)
        options = LoadStateDictConfig(
            dtype=self.dtype, dtype_plan=plan, device_map={"": device}, weight_mapping=self._rules
        )
        with torch.no_grad(), _quiet():
            report, _ = convert_and_load_state_dict_in_model(self.model, state, options)
        self.model._weight_conversions = [r for r in self._rules if r.was_used()]
        return report

    def _units(self) -> dict[str, list[str]]:
        """Unit -> its tensors that are saved, tied ones once."""
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        state = dict(self.model.state_dict())
        for name in self.model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, self.model)
        units: dict[str, list[str]] = {}
        for name in state:
            units.setdefault(self.unit_of(name), []).append(name)
        owner: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            unit = self.unit_of(name)
            first = owner.setdefault(id(parameter), unit)
            if first != unit and (first in self.blocks or unit in self.blocks):
                raise InvalidArgument(
                    f"{self.folder}: {name} is shared with {first}; blocks that share weights "
                    "cannot be read one at a time: load the model and use sparseworks.prune"
                )
        return units

    def unit_of(self, name: str) -> str:
        """The unit of a tensor of the model."""
        parts = name.split(".")
        for end in range(1, len(parts)):
            if (prefix := ".".join(parts[:end])) in self.blocks:
                return prefix
        return ".".join(parts[:-1])

    def _sources(self, checkpoint: PlainCheckpoint) -> dict[str, list[str]]:
        """Unit -> names on disk."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        renamings = [r for r in self._rules if isinstance(r, WeightRenaming)]
        converters = [r for r in self._rules if isinstance(r, WeightConverter)]
        own, base = self.model.state_dict(), self.model.base_model_prefix
        found: dict[str, list[str]] = {}
        for key in checkpoint.tensors:
            name, _ = rename_source_key(key, renamings, converters, base, own)
            if name not in own and key in own:
                name = key
            if name in own:
                found.setdefault(self.unit_of(name), []).append(key)
        return found

    def layout(self, original: bool = True) -> dict[str, Tensor]:
        """Empty tensors by their names on disk, all of the model, in the order of its saving."""
        saved = {n for names in self.units.values() for n in names}
        state = {n: t.detach().to("meta") for n, t in self.model.state_dict().items() if n in saved}
        return self._named(state, original)

    def stored(self, unit: str, original: bool = True) -> dict[str, Tensor]:
        """The tensors of a unit that is held, by their names on disk."""
        own = self.model.state_dict()
        return self._named({n: own[n] for n in self.units.get(unit, ())}, original)

    def _named(self, state: dict[str, Tensor], original: bool) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        if not original:
            return state
        with torch.no_grad():
            found: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return found

    def load(
        self, unit: str, checkpoint: PlainCheckpoint | None = None, mapped: bool = False
    ) -> None:
        """Read a unit, from the folder or from another checkpoint of the same model.

        Args:
            mapped: a block too as a map of its file, not as a copy.
        """
        source = checkpoint or self.source
        keys = (self._keys if checkpoint is None else self._sources(checkpoint)).get(unit, [])
        read = source.read if unit in self.blocks and not mapped else source.mapped
        report = self._convert({k: read(k) for k in keys}, "cpu")
        if unit not in self.blocks:
            held = {n for u in (*self.held, unit) for n in self.units.get(u, ())}
            missing = {n for n in report.missing_keys if n not in held}
            self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        self.held.add(unit)

    def free(self, unit: str) -> None:
        """Give the memory of a block back."""
        for module in self.model.get_submodule(unit).modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[attribute] = nn.Parameter(empty, parameter.requires_grad)
        self.held.discard(unit)
        _trim()

    def close(self) -> None:
        self.source.close()


def _trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The composite children of the outermost lists of modules that have two of them or more."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        if any(name == b or name.startswith(b + ".") for b in found):
            continue
        children = {
            f"{name}.{k}" if name else k: c
            for k, c in module.named_children()
            if any(True for _ in c.children())
        }
        if len(children) >= 2:
            found |= children
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bar for every block that is read."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
