"""Options that several commands have, with what their help says."""

from __future__ import annotations

from typing import Annotated

import tyro

__all__ = ["BatchSize", "Data", "EvalData", "EvalSamples", "Length", "MethodOptions", "Metrics",
           "Model", "Samples"]  # fmt: skip

Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        help="Hugging Face folder or hub name, `minilm`, a CIFAR ResNet .safetensors, "
        "file.py:factory, timm:NAME or torchvision:NAME (options behind another colon: "
        "timm:convnext_atto:num_classes=10,weights=FILE.safetensors)."
    ),
]
Data = Annotated[
    str | None,
    tyro.conf.arg(
        help="Calibration: docstrings, sources, digits, a text or parquet file, a folder, "
        "file.py:name."
    ),
]
Samples = Annotated[int, tyro.conf.arg(help="Calibration samples.")]
Length = Annotated[int, tyro.conf.arg(help="Tokens of a calibration window.")]
BatchSize = Annotated[int, tyro.conf.arg(help="Samples per calibration batch.")]
Metrics = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="perplexity, fidelity, retrieval, accuracy, file.py:function; default: what fits the "
        "model."
    ),
]
EvalData = Annotated[
    str | None, tyro.conf.arg(help="Evaluation data of the metrics; default: built-in text.")
]
EvalSamples = Annotated[
    int | None,
    tyro.conf.arg(
        help="Evaluation windows, sentences or images; default: 64 windows, 500 sentences, all "
        "images."
    ),
]
MethodOptions = Annotated[
    tuple[str, ...], tyro.conf.arg(help="Options of the method, name=value (JSON values).")
]
