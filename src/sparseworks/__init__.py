"""Sparsity that works: make any PyTorch model sparse, prove what it cost, skip the rest.

The whole surface is reachable from here and is imported on first use:

    import sparseworks as sw

    sw.prune(model, "wanda", sparsity=0.5, data=batches)
    run = sw.sparsify(model, optimizer, "rigl", sparsity=0.9, steps=N)
    sw.experiment(fit, model, "rewinding", sparsity=0.9)
    sw.slim(model, example, flops=0.5)
    sw.quantize(model, "gqsa", bits=4, sparsity=0.5, data=batches)
    run = sw.sparse_activations(model, "wina", sparsity=0.5, data=batches)
    run = sw.upcycle(model, experts=8, top_k=2)
    fast = sw.compile(model, example)
    sw.save(model, path); sw.load(path, model); sw.from_pretrained(folder)
"""

from __future__ import annotations

import importlib
from typing import Any

from sparseworks import activations as _activations  # registers the methods; imports no torch
from sparseworks import diagnostics as _diagnostics
from sparseworks import experts as _experts
from sparseworks import solvers as _solvers
from sparseworks import weights as _weights
from sparseworks.version import __version__

_LAZY = {
    "prune": "sparseworks.weights.oneshot.prune",
    "prune_folder": "sparseworks.weights.oneshot.from_disk",
    "save": "sparseworks.io",
    "load": "sparseworks.io",
    "from_pretrained": "sparseworks.io",
    "export_dense": "sparseworks.io",
    "export_quantized": "sparseworks.io",
    "export_onnx": "sparseworks.io.onnx",
    "save_masks": "sparseworks.io",
    "load_masks": "sparseworks.io",
    "sparsify": "sparseworks.training",
    "trainer_callback": "sparseworks.training.integrations",
    "sparsify_trainer": "sparseworks.training.trainers",
    "lightning_callback": "sparseworks.training.integrations",
    "Trace": "sparseworks.training.watching",
    "open_log": "sparseworks.training.logs",
    "transform": "sparseworks.training",
    "Distillation": "sparseworks.training.distilling",
    "optimizer": "sparseworks.training.optimizing",
    "experiment": "sparseworks.training.experiment",
    "rearrange": "sparseworks.weights.semistructured.rearranging",
    "slim": "sparseworks.weights.structured",
    "quantize": "sparseworks.weights.quantization.quantize",
    "grids": "sparseworks.models.quantized",
    "sparse_activations": "sparseworks.activations.running",
    "load_activations": "sparseworks.activations.running",
    "upcycle": "sparseworks.experts.upcycling",
    "compile": "sparseworks.engine",
    "compile_decoder": "sparseworks.engine",
    "load_compiled": "sparseworks.engine",
    "load_decoder": "sparseworks.engine",
    "evaluate": "sparseworks.diagnostics.harness",
    "audit": "sparseworks.diagnostics.audit",
    "masks": "sparseworks.core.masks",
    "attach": "sparseworks.core.masks",
    "Masks": "sparseworks.core.masks",
    "find_prunable": "sparseworks.models.views",
    "fold_torch_masks": "sparseworks.models.hooks",
    "NM": "sparseworks.core.patterns",
    "Unstructured": "sparseworks.core.patterns",
    "Block": "sparseworks.core.patterns",
    "Group": "sparseworks.core.patterns",
    "IndexGroups": "sparseworks.core.patterns",
    "Banded": "sparseworks.core.patterns",
    "SharedInputs": "sparseworks.core.patterns",
    "parse_pattern": "sparseworks.core.patterns",
    "by_sensitivity": "sparseworks.core.budgets",
    "by_masks": "sparseworks.core.budgets",
    "register": "sparseworks.core.plugins",
    "load_plugin": "sparseworks.core.plugins",
    "MethodInfo": "sparseworks.core.kinds",
    "SparseworksError": "sparseworks.core.errors",
}
_MODULES = {"methods", "schedules", "zoo"}

__all__ = ["__version__", *_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name == "methods":
        value = importlib.import_module("sparseworks.methods")
    elif name == "schedules":
        value = importlib.import_module("sparseworks.core.schedules")
    elif name == "zoo":
        value = importlib.import_module("sparseworks.models.zoo")
    else:
        raise AttributeError(f"module 'sparseworks' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


del _activations, _diagnostics, _experts, _solvers, _weights
