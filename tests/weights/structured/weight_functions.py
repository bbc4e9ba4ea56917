"""Networks whose weights are functions of their parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm


class ScaledStandard(nn.Conv2d):
    """(w - mean) / std over the fan-in of each output, times a learnt gain, as NFNets have it."""

    def __init__(self, inputs: int, outputs: int, size: int, **options: int) -> None:
        super().__init__(inputs, outputs, size, **options)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def made(self) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        made = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return made.reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, self.made(), self.bias, *options)


class Same(ScaledStandard):
    """The same, padding its input itself, which no plain convolution does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.made(), self.bias, self.stride)


class Network(nn.Module):
    """Two blocks of a normaliser-free network, one with groups, and a plain head."""

    def __init__(self, layer: type[nn.Module] = ScaledStandard) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = ScaledStandard(3, 8, 3, padding=1)
        self.down, self.wide = layer(8, 12, 2), ScaledStandard(12, 12, 3, padding=1, groups=4)
        self.out, self.head = ScaledStandard(12, 16, 1), nn.Linear(16, 4)
        self.gain = 1.7

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.down(F.silu(self.stem(x)) * self.gain))
        y = y + 0.2 * self.wide(F.silu(y))
        return self.head(F.silu(self.out(y)).mean((2, 3)))


class Exponential(nn.Module):
    """A positive weight: no zero of the parameter is a zero of the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp()


def sequence(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)
    )


def exponential(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Exponential())
    return layer


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "exponential": exponential,
    "weight norm by hook": hooked_weight_norm,
    "spectral norm by hook": hooked_spectral_norm,
}
