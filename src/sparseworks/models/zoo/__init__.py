"""Small reference models that the tests, claims and benchmarks train and compress."""

from sparseworks.models.zoo.diffusion import DDIM, TextToImage
from sparseworks.models.zoo.resnet import CifarResNet, load_resnet, resnet20, resnet56

__all__ = ["DDIM", "CifarResNet", "TextToImage", "load_resnet", "resnet20", "resnet56"]
