"""Lossless sparse checkpoints: packed safetensors files, Hugging Face folders, others' formats.

sw.save(model, "model.safetensors")        # one packed file of any nn.Module
sw.load("model.safetensors", model)        # fill a model: values, buffers, mask record
sw.save(model, "folder", tokenizer=tok)    # a Hugging Face folder, weights packed
model = sw.from_pretrained("folder")       # build the model from any Hugging Face folder
sw.export_dense(model, "plain")            # for tools that know nothing of sparsity
sw.export_quantized(model, "int4")         # integers, as compressed-tensors stores them
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseworks.io.folders import export_dense as export_dense
    from sparseworks.io.huggingface import from_pretrained as from_pretrained
    from sparseworks.io.loading import load as load
    from sparseworks.io.masks_beside import load_masks as load_masks
    from sparseworks.io.masks_beside import save_masks as save_masks
    from sparseworks.io.quantized import export_quantized as export_quantized
    from sparseworks.io.saving import save as save
    from sparseworks.io.summary import CheckpointInfo as CheckpointInfo
    from sparseworks.io.summary import TensorInfo as TensorInfo
    from sparseworks.io.summary import inspect as inspect
    from sparseworks.io.zeros import infer_masks as infer_masks

_LAZY = {
    "CheckpointInfo": "summary",
    "TensorInfo": "summary",
    "inspect": "summary",
    "save": "saving",
    "export_dense": "folders",
    "export_quantized": "quantized",
    "save_masks": "masks_beside",
    "load_masks": "masks_beside",
    "load": "loading",
    "from_pretrained": "huggingface",
    "infer_masks": "zeros",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sparseworks.io' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sparseworks.io.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
