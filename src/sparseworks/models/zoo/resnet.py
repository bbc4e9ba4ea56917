"""The CIFAR ResNets of He et al. 2016 (Deep Residual Learning for Image Recognition, section 4.2).

6n + 2 layers: a 3x3 convolution, three stages of n basic blocks with 16, 32 and 64 channels, global
average pooling, one linear layer. Shortcuts between stages are option A: stride-2 subsampling and
zero padding of the channels, without parameters.
"""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import CheckpointError

__all__ = [
    "MEAN",
    "STD",
    "BasicBlock",
    "CifarResNet",
    "load_resnet",
    "normalize",
    "resnet20",
    "resnet56",
]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A CIFAR ResNet.

    Args:
        blocks: basic blocks in each stage (3: ResNet-20, 9: ResNet-56).
        classes: outputs.
        width: channels of the first stage; the others have two and four times as many.
    """

    def __init__(self, blocks: int, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Images `[batch, 3, height, width]`, normalised by MEAN and STD, to logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def resnet20(classes: int = 10, width: int = 16) -> CifarResNet:
    """ResNet-20: 269,722 parameters with 10 classes and width 16."""
    return CifarResNet(3, classes, width)


def resnet56(classes: int = 10) -> CifarResNet:
    """ResNet-56: 853,018 parameters with 10 classes."""
    return CifarResNet(9, classes)


def load_resnet(path: str | os.PathLike[str]) -> CifarResNet:
    """The CIFAR ResNet of a plain safetensors file, its depth read from the names in it.

    Raises:
        CheckpointError: not a safetensors file, or not of a CIFAR ResNet.
    """
    try:
        with safe_open(path, "pt") as file:
            state: dict[str, Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None
    stages = {k.split(".")[1] for k in state if k.startswith("layer1.")}
    if not stages or "linear.weight" not in state:
        raise CheckpointError(f"{path}: not a CIFAR ResNet (no layer1.* or linear.weight)")
    model = CifarResNet(len(stages), state["linear.weight"].shape[0])
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
    missing = [m for m in missing if not m.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise CheckpointError(f"{path}: missing {missing[:2]}, unexpected {unexpected[:2]}")
    return model.eval()


def normalize(images: Tensor) -> Tensor:
    """RGB images in [0, 1], `[batch, 3, height, width]`, as the ResNets take them."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    return (images - mean) / std
