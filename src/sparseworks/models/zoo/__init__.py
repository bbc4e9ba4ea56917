"""Small reference models that the tests, claims and benchmarks train and compress."""

from sparseworks.models.zoo.decoder import ByteDecoder, FeedForward
from sparseworks.models.zoo.diffusion import DDIM, TextToImage
from sparseworks.models.zoo.hyperbolic import HyperbolicClassifier, LorentzLinear
from sparseworks.models.zoo.libraries import from_library
from sparseworks.models.zoo.recommenders import LightGCN, MatrixFactorization
from sparseworks.models.zoo.resnet import CifarResNet, load_resnet, resnet20, resnet56
from sparseworks.models.zoo.supernet import CellNetwork, SuperNetwork
from sparseworks.models.zoo.unet import UNet
from sparseworks.models.zoo.vit import ViT

__all__ = [
    "DDIM",
    "ByteDecoder",
    "CellNetwork",
    "CifarResNet",
    "FeedForward",
    "HyperbolicClassifier",
    "LightGCN",
    "LorentzLinear",
    "MatrixFactorization",
    "SuperNetwork",
    "TextToImage",
    "UNet",
    "ViT",
    "from_library",
    "load_resnet",
    "resnet20",
    "resnet56",
]
