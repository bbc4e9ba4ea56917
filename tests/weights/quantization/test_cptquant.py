"""CPTQuant: the three sensitivities against plain formulas, and what they decide."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.models.calls import default_loss
from sparseworks.models.views import find_prunable
from sparseworks.weights.quantization.sensitivities import (
    canonical_correlation,
    correlation,
    pruning,
    taylor,
)


def quantized(**options):
    model = tiny_models.language_model()
    return sw.quantize(model, "cptquant", data=tiny_models.texts(), **options)


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    return model.double(), [(x[:10].double(), y[:10]), (x[10:].double(), y[10:])]


def test_pruning_is_the_mean_rise_of_the_loss_of_each_layer_alone():
    model, batches = mlp()
    views = list(find_prunable(model, include=["0", "2"]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = pruning(model, {v.module_name: [v] for v in views}, batches, default_loss, (0.3, 0.8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for view in views:
        rises = []
        for sparsity in (0.3, 0.8):
            weight = view.parameter.detach().clone()
            flat = sorted(weight.flatten().abs().tolist())
            threshold = flat[int(sparsity * len(flat))]
            cut = torch.where(weight.abs() >= threshold, weight, 0.0)
            layers = [cut if i == int(view.module_name) else model[i].weight for i in (0, 2, 4)]
            losses = []
            for weights in (layers, [model[i].weight for i in (0, 2, 4)]):
                total = 0.0
                for x, y in batches:
                    for i, w in zip((0, 2, 4), weights):
                        x = F.linear(x, w, model[i].bias)
                        x = x.tanh() if i < 4 else x
                    total += float(F.cross_entropy(x.float(), y).detach()) / 2
                losses.append(total)
            rises.append(losses[0] - losses[1])
        assert abs(found[view.module_name] - sum(rises) / 2) < 1e-5


def test_taylor_is_what_noise_in_the_input_does_to_first_order():
    model, batches = mlp()
    found = taylor(model, ["0", "2", "4"], batches, default_loss)
    generator = torch.Generator().manual_seed(0)
    e = 1e-3
    for first in (0, 2, 4):
        expected = 0.0
        for x, y in batches:
            hidden = model[:first](x)
            size = e * hidden.norm() / hidden.numel() ** 0.5
            squares = []
            for _ in range(2000):
                noise = size * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    up, down = (
                        F.cross_entropy(model[first:](hidden + s * noise), y) for s in (1, -1)
                    )
                squares.append(float((up - down) / 2) ** 2)
            expected += (sum(squares) / len(squares)) ** 0.5 / e / len(batches)
        assert abs(found[str(first)] / expected - 1) < 0.1


def test_canonical_correlations_are_those_of_two_bases():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(5, 5, generator=generator, dtype=torch.float64)
    y = y + torch.randn(300, 5, generator=generator, dtype=torch.float64)
    bases = [torch.linalg.qr(t - t.mean(0))[0] for t in (x, y)]
    wanted = torch.linalg.svdvals(bases[0].T @ bases[1]).mean()
    assert abs(canonical_correlation(x, y, 1e-12) - float(wanted)) < 1e-8
    assert canonical_correlation(x, 3 * x @ torch.randn(5, 5, dtype=torch.float64), 1e-12) > 0.999
    independent = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    assert canonical_correlation(x, independent, 1e-12) < 0.2


def test_blocks_that_change_little_correlate_most():
    model = tiny_models.language_model()
    names = ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
        for part in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            part.weight.mul_(30)
    found = correlation(model, names, tiny_models.texts(), damping=1e-9)
    assert abs(found["model.layers.1"]) < 1e-6 < 0.01 < found["model.layers.0"]
    short = [{"input_ids": torch.arange(3, 20)[None]}]
    with pytest.raises(DataError, match="more tokens"):
        correlation(model, names, short)


@pytest.mark.parametrize("measure", ["pruning", "taylor", "correlation"])
def test_bits_follow_the_measure_and_the_mean_holds(measure):
    done = quantized(measure=measure, bits=6.0, levels=(8, 4))
    s, bits = done.figures["sensitivity"], done.figures["bits"]
    assert set(s) == {"model.layers.0", "model.layers.1"} and sorted(bits.values()) == [4, 8]
    assert bits[max(s, key=s.get)] == 8
    again = quantized(measure=measure, bits=6.0, levels=(8, 4), reverse=True).figures["bits"]
    assert again == {name: 12 - b for name, b in bits.items()}
    assert quantized(measure="taylor", bits=6.0, levels=(8, 4), given=s).figures["bits"] == bits
    with pytest.raises(InvalidArgument, match="differ in"):
        quantized(given={"model.layers.0": 1.0})
    mean = sum(t.bits * t.total for t in done.tensors) / sum(t.total for t in done.tensors)
    assert mean == 6.0


def test_rows_have_scales_and_tensors_bits_of_their_own(tmp_path):
    done = quantized(per="tensor", bits=5.0, measure="taylor")
    assert len(done.figures["bits"]) == 14 and len(set(done.figures["bits"].values())) > 1
    for name, entry in done.grids.items():
        assert entry.bits == done.figures["bits"][name.removesuffix(".weight")]
        assert entry.group == done.model.get_parameter(name).shape[1] and entry.grid.zero is None
    sw.save(done.model, tmp_path / "m.safetensors")
    again = tiny_models.language_model()
    sw.load(tmp_path / "m.safetensors", again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), done.model.parameters()))


def test_sixteen_bits_leave_a_layer_as_it_is_and_masks_stay():
    model = tiny_models.language_model()
    sw.prune(model, "magnitude", sparsity=0.5)
    before = dict(tiny_models.language_model().named_parameters())
    done = sw.quantize(model, "cptquant", data=tiny_models.texts(), bits=10, levels=(16, 4))
    whole = [n for n, b in done.figures["bits"].items() if b == 16]
    assert len(whole) == 1 and len(done.tensors) == 7
    assert sum("16 bits" in reason for reason in done.skipped.values()) == 7
    for name, mask in sw.masks(model).items():
        now = model.get_parameter(name).detach()
        assert not now[~mask].any()
        if name.startswith(whole[0]):
            assert torch.equal(now, before[name].detach() * mask)


@pytest.mark.parametrize("options", [
    {"levels": ()}, {"levels": (8, 12)}, {"bits": 3.0}, {"measure": "x"}, {"per": "x"},
    {"measure": "correlation", "per": "tensor"}, {"sparsities": ()}, {"sparsities": (1.0,)},
    {"damping": 0.0},
])  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(InvalidArgument):
        quantized(**options)
