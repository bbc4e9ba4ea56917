"""The part of CIFAR-10 that claims share."""

from __future__ import annotations

import torch
from torch import nn

from sparseworks.data.images import ImageSet
from sparseworks.diagnostics import subjects


class Says(nn.Module):
    """Always the class 3."""

    def forward(self, x):
        return torch.eye(10)[3].expand(len(x), 10)


def test_a_part_is_chosen_by_its_seed_and_averaged(monkeypatch, tmp_path):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=g, dtype=torch.uint8)
    whole = ImageSet(pixels, torch.arange(40) % 10)
    monkeypatch.setenv("SPARSEWORKS_DATA", str(tmp_path))
    monkeypatch.setattr(subjects, "_read", lambda path, limit=None: whole)
    part, held = subjects.image_subject(1, 15, size=16, held=20)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:15]
    assert torch.equal(part.labels, whole.labels[order])
    mean = pixels[order].float().view(15, 3, 16, 2, 16, 2).mean((3, 5))
    assert bool(((part.pixels.float() - mean).abs() <= 0.5).all())
    assert held(Says()) == 10.0  # two of the first twenty
    same, _ = subjects.image_subject(1, 15)
    assert torch.equal(same.pixels, pixels[order])
    other, _ = subjects.image_subject(2, 15)
    assert not torch.equal(other.labels, part.labels)
