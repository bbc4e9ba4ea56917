"""The colours of pages: apart for those who see fewer colours, and from the paper."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparseworks.report.page import COLORS

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SIGHT = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def linear(color: str) -> torch.Tensor:
    values = torch.tensor([int(color[i : i + 2], 16) for i in (1, 3, 5)]).double() / 255
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: torch.Tensor) -> torch.Tensor:
    xyz = torch.tensor(XYZ).double() @ rgb.clamp(0, 1) / torch.tensor([0.9505, 1, 1.089]).double()
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_look_alike(sight: str) -> None:
    seen = [lab(torch.tensor(SIGHT[sight]).double() @ linear(c)) for c in COLORS]
    for (i, a), (j, b) in itertools.combinations(enumerate(seen), 2):
        assert float((a - b).norm()) > 20, (COLORS[i], COLORS[j])


def test_they_stand_out_from_white() -> None:
    for color in COLORS:
        luminance = float(torch.tensor(XYZ[1]).double() @ linear(color))
        assert 1.05 / (luminance + 0.05) >= 3, color  # WCAG 2.1, 1.4.11
