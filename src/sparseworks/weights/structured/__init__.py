"""Smaller dense models: scores of coupled groups, cutting, and what trains towards both."""

from __future__ import annotations

import importlib
from typing import Any

from sparseworks.core import registry

_ROOM = "sparseworks.weights.structured"

registry.register(
    {
        "group-norm": f"{_ROOM}.scores:GroupNorm",
        "group-random": f"{_ROOM}.scores:RandomGroups",
        "group-bn": f"{_ROOM}.scores:BatchNormScale",
        "group-taylor": f"{_ROOM}.scores:Taylor",
        "group-fisher": f"{_ROOM}.scores:Fisher",
        "group-energy": f"{_ROOM}.scores:ActivationEnergy",
        "cfsp": f"{_ROOM}.cfsp:CFSP",
        "ecodiff": f"{_ROOM}.ecodiff:EcoDiff",
        "ofb": f"{_ROOM}.ofb:OFB",
        "group-distillation": f"{_ROOM}.group_distillation:GroupDistillation",
        "mask-sparsity": f"{_ROOM}.mask_sparsity:MaskSparsity",
        "pat": f"{_ROOM}.pat:PAT",
        "precrop": f"{_ROOM}.precrop:PreCrop",
        "slicegpt": f"{_ROOM}.slicegpt:SliceGPT",
        "wgsef": f"{_ROOM}.wgsef:WGSEF",
    }
)

_LAZY = {
    "slim": "slimming",
    "SlimResult": "result",
    "Width": "result",
    "latency": "measure",
    "onnx_latency": "measure",
    "export_onnx": "measure",
    "crop": "precrop",
    "save_slim": "saving",
    "load_slim": "saving",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{_ROOM}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
