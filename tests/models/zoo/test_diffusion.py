"""Sampling with the true noise gives back the image; shapes are as said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparseworks.models.zoo.diffusion import (
    DDIM,
    TextToImage,
    diffusion_loss,
    fit_diffusion,
    words_to_tokens,
)


class Oracle(nn.Module):
    """Knows the image: its noise is what is left of x_t."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor, t: Tensor, condition: object) -> Tensor:
        a = torch.cos(t * torch.pi / 2).square().view(-1, 1, 1, 1)
        return (x - a.sqrt() * self.image) / (1 - a).sqrt()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(0, 1000))
def test_a_perfect_denoiser_samples_its_image(steps: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 1, 8, 8, generator=g).double()
    noise = torch.randn(2, 1, 8, 8, generator=g).double()
    found = DDIM(steps).sample(Oracle(image), noise, torch.zeros(0))
    torch.testing.assert_close(found, image, rtol=1e-3, atol=1e-3)


def test_the_loss_of_a_perfect_denoiser_is_zero_and_of_silence_one() -> None:
    image = torch.randn(4, 1, 8, 8)
    g = torch.Generator().manual_seed(0)
    assert diffusion_loss(Oracle(image), image, torch.zeros(0), g) < 1e-6
    many = torch.zeros(500, 1, 8, 8)
    silent = TextToImage(width=16, depth=1, heads=2)
    nn.init.zeros_(silent.denoiser.outlet.weight)
    nn.init.zeros_(silent.denoiser.outlet.bias)
    tokens = words_to_tokens(["one"] * 500)
    with torch.no_grad():
        assert float(diffusion_loss(silent, many, tokens, g)) == pytest.approx(1.0, abs=0.03)


def test_words_are_letters_padded_and_conditions_differ() -> None:
    tokens = words_to_tokens(["one", "seven"])
    assert tokens.tolist() == [[15, 14, 5, 0, 0], [19, 5, 22, 5, 14]]
    torch.manual_seed(0)
    model = TextToImage(width=16, depth=1, heads=2)
    c = model.encoder(tokens)
    assert c.shape == (2, 16) and not torch.allclose(c[0], c[1])
    out = model(torch.randn(2, 1, 8, 8), torch.rand(2), tokens)
    assert out.shape == (2, 1, 8, 8)


def test_training_lowers_the_loss_and_is_a_function_of_its_seed() -> None:
    images = torch.randn(4, 1, 8, 8).repeat(16, 1, 1, 1)
    tokens = words_to_tokens(["zero", "one", "two", "three"] * 16)

    def fitted(steps: int) -> TextToImage:
        torch.manual_seed(0)
        model = TextToImage(width=16, depth=1, heads=2, text_depth=1)
        g = torch.Generator().manual_seed(0)
        fit_diffusion(model, images, tokens, g, steps=steps, batch=16, lr=5e-3)
        return model

    def loss(model: TextToImage) -> float:
        with torch.no_grad():
            g = torch.Generator().manual_seed(1)
            return float(diffusion_loss(model, images, tokens, g))

    one, two = fitted(40), fitted(40)
    assert loss(one) < 0.8 * loss(fitted(0))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
