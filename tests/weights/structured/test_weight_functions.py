"""Weights that are functions of parameters are made plain, or stay whole with the reason."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from weight_functions import NORMS, Network, Same, ScaledStandard, sequence

import sparseworks as sw
from sparseworks.core.errors import ModelError
from sparseworks.core.masks import Masks, attach
from sparseworks.models.coupling import trace
from sparseworks.weights.structured import load_slim, save_slim
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.materialising import materialise

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")


@pytest.mark.parametrize("name", ["standardised", *NORMS])
def test_a_plain_layer_computes_the_same_and_can_be_undone(name: str) -> None:
    model = Network() if name == "standardised" else sequence(NORMS[name])
    model, x = model.eval(), IMAGES if name == "standardised" else ROWS
    with torch.no_grad():
        before = model(x)
        named = {n: p.clone() for n, p in model.named_parameters()}
        functions, backup = trace(model, x).functions, Backup()
        made, whole = materialise(model, x, functions, backup)
        assert made == tuple(f.module for f in functions) and made and not whole
        assert all(type(model.get_submodule(p)) in (nn.Linear, nn.Conv2d) for p in made)
        torch.testing.assert_close(model(x), before)
        assert not trace(model, x).functions
        backup.restore()
        assert torch.equal(model(x), before)
    assert all(torch.equal(p, named[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", NORMS)
def test_slimming_it_is_slimming_the_plain_model(name: str) -> None:
    model, plain = sequence(NORMS[name]).eval(), sequence(lambda layer: layer).eval()
    with torch.no_grad():
        model(ROWS)  # hooks compute the weight in a call
        for mine, theirs in zip(plain[::2], model[::2]):
            mine.weight.copy_(theirs.weight)
            mine.bias.copy_(theirs.bias)
    result = sw.slim(model, ROWS, flops=0.6)
    sw.slim(plain, ROWS, flops=0.6)
    torch.testing.assert_close(model(ROWS), plain(ROWS))
    assert result.plain == ("2",) and "plain now, with the weight computed before: 2" in str(result)


def test_a_network_of_standardised_weights_is_slimmed_saved_and_loaded(tmp_path: Path) -> None:
    model = Network().eval()
    whole = sum(p.numel() for p in model.parameters())
    result = sw.slim(model, IMAGES, flops=0.5)
    assert result.flops[1] <= 0.5 * result.flops[0] and result.parameters[0] == whole
    assert result.plain == ("stem", "down", "wide", "out") and not result.warnings
    save_slim(result, tmp_path / "slim")
    again = load_slim(tmp_path / "slim", Network())
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_what_no_plain_layer_computes_stays_whole_and_is_named() -> None:
    model = Network(Same).eval()
    result = sw.slim(model, IMAGES, flops=0.9)
    assert type(model.down) is Same and model.down.weight.shape == (12, 8, 2, 2)
    assert model.stem.weight.shape[0] == 8 and result.plain == ("stem", "wide", "out")
    assert any("down" in w and "batch_norm" in w and "left whole" in w for w in result.warnings)
    assert "left whole: down: its weight is a function" in str(trace(model, IMAGES))


class Normalised(nn.Module):
    """A layer of one's own, after one that only it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), nn.functional.normalize(self.weight))


def test_a_model_with_nothing_else_to_cut_says_why() -> None:
    with pytest.raises(ModelError, match=r"no group may be cut.*its weight is a function"):
        sw.slim(Normalised(), ROWS, flops=0.5)


def with_masks(model: nn.Module) -> nn.Module:
    attach(model, Masks.of({"out.weight": torch.ones(16, 12, 1, 1, dtype=torch.bool)}))
    return model


def with_hook(model: nn.Module) -> nn.Module:
    model.out.register_forward_hook(lambda m, i, o: o + 1)
    return model


def with_shared_gain(model: nn.Module) -> nn.Module:
    model.stem.gain = nn.Parameter(torch.ones(12, 1, 1, 1)[:8])
    model.down.gain = model.wide.gain
    return model


@pytest.mark.parametrize(
    ("change", "layer", "words"),
    [
        (with_masks, "out", "it has masks"),
        (with_hook, "out", "it has hooks"),
        (with_shared_gain, "down", "share its parameters"),
    ],
)
def test_what_a_plain_layer_would_lose_keeps_it_from_being_made(change, layer, words) -> None:  # type: ignore[no-untyped-def]
    model = change(Network().eval())
    made, whole = materialise(model, IMAGES, trace(model, IMAGES).functions, Backup())
    assert layer not in made and any(words in w and layer in w for w in whole)


def test_masks_and_scales_of_weights_are_followed_as_they_are() -> None:
    masked = sequence(lambda layer: prune.random_unstructured(layer, "weight", 0.4)).eval()
    coupling = trace(masked, ROWS)
    assert not coupling.functions and sorted(len(f) for f in coupling.families) == [6, 8]
    assert sw.slim(masked, ROWS, flops=0.6).plain == ()


def test_a_call_that_fails_later_puts_the_layers_back() -> None:
    model = Network().eval()
    before, output = copy.deepcopy(model.state_dict()), model(IMAGES)
    with pytest.raises(sw.SparseworksError, match="cannot fall"):
        sw.slim(model, IMAGES, flops=0.001)
    assert type(model.stem) is ScaledStandard
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(model(IMAGES), output)


def test_batch_statistics_over_channels_are_not_cut_as_zeros() -> None:
    class Batch(nn.Module):
        """Rows normalised over their channels, by a batch norm that has rows for channels."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.batch_norm(self.first(x)[None], None, None, training=True)
            return self.last(y[0])

    (family,) = trace(Batch(), ROWS).families
    assert len(family) == 8 and not family.exact and "normalised" in family.reason
