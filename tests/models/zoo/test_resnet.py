"""The CIFAR ResNets: their size, their checkpoints, their accuracy."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparseworks.core.errors import CheckpointError
from sparseworks.models.zoo.resnet import CifarResNet, load_resnet, normalize, resnet20, resnet56


def test_parameter_counts_are_the_papers():
    assert sum(p.numel() for p in resnet20().parameters()) == 269_722
    assert sum(p.numel() for p in resnet56().parameters()) == 853_018
    narrow = CifarResNet(3, width=4)
    assert sum(p.numel() for p in narrow.parameters() if p.dim() == 4) == (
        27 * 4 + 9 * 6 * 16 + 9 * (32 + 5 * 64) + 9 * (128 + 5 * 256)
    )
    assert narrow(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("name,depth", [("resnet20", 3), ("resnet56", 9)])
def test_checkpoints_classify_real_images(data_root, name, depth):
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    model = load_resnet(data_root / "models" / f"{name}-cifar10.safetensors")
    assert len(model.layer1) == depth
    table = parquet.read_table(data_root / "cifar10" / "test.parquet").slice(0, 300)
    pixels = np.stack([np.array(image.open(io.BytesIO(b))) for b in table["image"].to_pylist()])
    x = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    with torch.no_grad():
        right = (model(x).argmax(1) == torch.tensor(table["label"].to_pylist())).float().mean()
    assert right > 0.84


def test_other_files_are_refused(tmp_path):
    state = resnet20().state_dict()
    state["conv1.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "shape.safetensors")
    with pytest.raises(CheckpointError, match="conv1"):
        load_resnet(tmp_path / "shape.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_resnet(tmp_path / "m.safetensors")
