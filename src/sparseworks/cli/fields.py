"""Options that several commands have, with what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["BatchSize", "Data", "Dense", "Distill", "EvalData", "EvalSamples", "Length",
           "MaskBudget", "MaskPattern", "Masked", "MethodOptions", "Metrics", "Model", "Samples",
           "Start", "Teacher", "Twin"]  # fmt: skip

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
# of trainings
Start = Annotated[
    str | None,
    tyro.conf.arg(help="Weights to start from: a packed or plain safetensors file of the model."),
]
MaskPattern = Annotated[
    str | None,
    tyro.conf.arg(help="unstructured, row, N:M, blockHxW; default: the method's own."),
]
MaskBudget = Annotated[
    str | None, tyro.conf.arg(help="uniform, erk or global; default: the method's own.")
]
Masked = Annotated[
    tuple[str, ...], tyro.conf.arg(help="Name patterns of the only weights to mask.")
]
Dense = Annotated[tuple[str, ...], tyro.conf.arg(help="Name patterns of weights to leave dense.")]
Teacher = Annotated[
    str | None,
    tyro.conf.arg(
        help="Teacher of a distillation: start (a copy of the model as it starts, before any "
        "pruning), or its weights in a safetensors file, or a Hugging Face folder."
    ),
]
Distill = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="Weights of its loss, name=value: task, kl, temperature, squarehead, features, half "
        "(bf16); default: the method's own, else task=0.5 kl=0.5 temperature=2."
    ),
]
Twin = Annotated[
    Path | None,
    tyro.conf.arg(
        help="Folder of another finished training, say a dense one: its loss goes into "
        "report.html too."
    ),
]
