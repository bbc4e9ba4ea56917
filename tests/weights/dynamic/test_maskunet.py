"""Masks that depend on sample and time, against the formulas written plainly."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.random import generator_for
from sparseworks.models.zoo import DDIM, UNet
from sparseworks.models.zoo.diffusion import diffusion_loss
from sparseworks.weights.dynamic.mask_search import search_masks
from sparseworks.weights.dynamic.maskunet import layers_of, masks_of, merged

NAMES = [f"up_blocks.{i}.attention.{n}.weight" for i in (0, 1) for n in ("q", "k", "v", "out")]


def unet():
    torch.manual_seed(0)
    return UNet(channels=(8, 12), time=16).eval()


def call(batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, 8, 8, generator=g), torch.rand(batch, generator=g)


def stirred(model, scale=0.3, seed=1):
    """Generators and adapters as training might leave them, so that masks differ."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for part in (layer.rows, layer.columns):
                part.weight.copy_(torch.randn(part.weight.shape, generator=g) * 2 * scale)
                part.bias.copy_(torch.randn(part.bias.shape, generator=g) * scale)
            outer = layer.block.generator.outer
            outer.weight.copy_(torch.randn(outer.weight.shape, generator=g) * 3 * scale)
    return model


def transformed(**options):
    model = unet()
    return model, sw.transform(model, "maskunet", **{"example": call(), **options})


def test_it_starts_as_the_model_was_and_only_masks_train():
    plain, (model, job) = unet(), transformed()
    assert sorted(layers_of(model)) == sorted(NAMES)
    x, t = call()
    torch.testing.assert_close(model(x, t), plain(x, t), rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.AdamW(job.parameter_groups(), 0.05)
    job.attach(optimizer)
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        optimizer.zero_grad()
        diffusion_loss(model.train(), x, torch.zeros(3), g).backward()
        optimizer.step()
    for name, before in plain.named_parameters():
        now = model.get_parameter(name)
        assert torch.equal(now, before) and now.grad is None and not now.requires_grad
    generators = {id(m.block.generator): m.block.generator for m in layers_of(model).values()}
    assert len(generators) == 2
    for generator in generators.values():  # M is alive: its own weights have a gradient
        assert all(float(p.grad.abs().sum()) > 0 for p in generator.parameters())
    job.finish()
    assert all(p.requires_grad for p in model.parameters())


def plainly(model, x, t):
    """Logits of every layer of the first block by the equation, entry by entry in fp64."""
    seen = {}

    def look(module, args):
        seen["args"] = [a.double() for a in args]

    with model.up_blocks[0].register_forward_pre_hook(look), torch.no_grad():
        model(x, t)
    below, skip, time = seen["args"]
    h = torch.cat([below, skip], 1).mean((2, 3))
    first = layers_of(model)["up_blocks.0.attention.q.weight"]
    own = {n: p.detach().double() for n, p in first.block.generator.named_parameters()}
    h = h + time @ own["time.weight"].t()
    inner = (h @ own["inner.weight"].t() + own["inner.bias"]).clamp_min(0)
    m = (inner @ own["outer.weight"].t() + own["outer.bias"]).clamp_min(0)
    m = m.view(len(x), *first.block.generator.shape)
    logits = {}
    for name, layer in layers_of(model).items():
        if not name.startswith("up_blocks.0"):
            continue
        r, b, c, d = (
            p.detach().double()
            for p in (layer.rows.weight, layer.rows.bias, layer.columns.weight, layer.columns.bias)
        )
        found = torch.zeros(len(x), layer.out_features, layer.in_features, dtype=torch.float64)
        for o in range(layer.out_features):
            for i in range(layer.in_features):
                inside = torch.einsum("p,bpq->bq", r[o], m) + b[o]
                found[:, o, i] = inside @ c[i] + d[i]
        logits[name] = found
    return logits


def test_logits_and_outputs_are_the_equation_for_every_sample():
    model = stirred(transformed()[0])
    x, t = call()
    expected = plainly(model, x, t)
    seen = {}
    for name in expected:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_hook(lambda m, a, out, name=name: seen.update({name: (a[0], out)}))
    with torch.no_grad():
        model(x, t)
    for name, logits in expected.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(
            layer.logits(layer.block.now).double(), logits, rtol=1e-4, atol=1e-5
        )
        assert torch.equal(layer.last, logits > 0)
        assert 0.05 < layer.last.float().mean() < 0.95 and not torch.equal(*layer.last[:2])
        inputs, outputs = seen[name]
        for b in range(len(x)):
            own = F.linear(inputs[b], layer.weight * layer.last[b], layer.bias)
            torch.testing.assert_close(outputs[b], own, rtol=1e-5, atol=1e-5)


def test_the_gradient_goes_straight_through():
    """dm/dL = sigmoid'((L + g) / tau) / tau, with the hard mask in the forward pass."""
    model, _ = transformed(tau=0.7)
    name = "up_blocks.0.attention.q.weight"
    layer = layers_of(stirred(model))[name].train()
    m = torch.rand(2, *layer.block.generator.shape)
    logits = layer.logits(m)
    uniform = torch.rand(logits.shape, generator=generator_for(0, name, 1))
    noisy = (logits.detach() - torch.log(-torch.log(uniform))).double()
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    masks = layer.masks(m)
    assert torch.equal(masks.detach(), (noisy > 0).float()) and int(layer.draws) == 1
    [found] = torch.autograd.grad(masks, layer.columns.bias, upstream)
    y = torch.sigmoid(noisy / 0.7)
    slope = y * (1 - y) / 0.7
    torch.testing.assert_close(found.double(), (upstream * slope).sum((0, 1)), rtol=1e-3, atol=1e-4)


def test_the_released_initialisation_has_no_gradient():
    """relu'(0) = 0: with offset 0 the generator never learns, which is why ours starts at 1."""
    model, _ = transformed(offset=0.0)
    for layer in layers_of(model).values():
        layer.columns.weight.data.normal_()
        layer.rows.weight.data.normal_()
    model.train()(*call()).square().sum().backward()
    generator = layers_of(model)[NAMES[0]].block.generator
    assert not any(bool(p.grad.any()) for p in generator.parameters())


def test_masks_of_a_call_are_merged_saved_and_loaded(tmp_path):
    model = stirred(transformed()[0])
    x, t = call(1)
    record = masks_of(model, x, t)
    assert sorted(record) == sorted(NAMES) and 0.05 < record.sparsity() < 0.95
    plain = merged(model, x, t)
    assert type(plain.up_blocks[0].attention.q) is nn.Linear
    assert not any("generator" in n or "rows" in n for n in plain.state_dict())
    for name in NAMES:
        assert not plain.get_parameter(name).detach()[~record[name]].any()
        kept = plain.get_parameter(name).detach()[record[name]]
        assert torch.equal(kept, model.get_parameter(name).detach()[record[name]])
    with torch.no_grad():
        torch.testing.assert_close(plain(x, t), model(x, t), rtol=1e-5, atol=1e-6)
    size = sw.save_masks(record, tmp_path / "t.safetensors")
    assert size < sum(m.numel() for m in record.values()) / 8 + 4096
    other = unet()
    loaded = sw.load_masks(tmp_path / "t.safetensors", other)
    loaded.apply(other)
    with torch.no_grad():
        assert torch.equal(other(x, t), plain(x, t))
    assert not torch.equal(masks_of(model, *call(1, 9))[NAMES[0]], record[NAMES[0]])
    with pytest.raises(ModelError, match="one sample"):
        masks_of(model, *call(2))
    with pytest.raises(ModelError, match="masked layers"):
        masks_of(plain, x, t)


def test_copies_and_state_are_their_own():
    model = stirred(transformed()[0])
    x, t = call()
    model.train()(x, t)
    twin, again = copy.deepcopy(model).eval(), transformed()[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    with torch.no_grad():
        expected = model.eval()(x, t)
        assert torch.equal(twin(x, t), expected) and torch.equal(again(x, t), expected)
        layers_of(twin)[NAMES[0]].block.generator.outer.bias.zero_()
        assert torch.equal(model(x, t), expected)


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.4}, {"pattern": "2:4", "include": "*attention*"}]
)
def test_a_share_is_kept_exactly_in_every_sample(options):
    model, job = transformed(**options)
    stirred(model)
    with torch.no_grad():
        model(*call())
    for layer in layers_of(model).values():
        zeros = (~layer.last).flatten(1).sum(1)
        wanted = 0.5 if "pattern" in options else 0.4
        assert zeros.tolist() == [int(wanted * layer.weight.numel())] * 3
    job.finish()
    assert sw.masks(model).violations(model) == {}


def test_refused_before_anything_changes():
    model = unet()
    before = [type(m) for m in model.modules()]
    for options, said in (
        ({}, "give example="),
        ({"example": call(), "blocks": "decoder.*"}, "no module has a name like"),
        ({"example": call(), "skip": "attention time"}, "no linear layer"),
        ({"example": call(), "factor": 0}, "at least 1"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            sw.transform(model, "maskunet", **options)
        assert [type(m) for m in model.modules()] == before
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())


def test_the_search_is_the_plain_loop_for_one_chain():
    model, sampler = unet(), DDIM(steps=3)
    noise, _ = call(2)
    condition = torch.zeros(2)
    reward = lambda x: -x.square().mean((1, 2, 3)) + 0.3 * x[:, 0, 0, 0]  # noqa: E731
    names = [NAMES[0], NAMES[7]]
    found = search_masks(
        model, noise, condition, reward, sampler, names, iterations=(1, 2), few=1, lr=0.1
    )
    x = noise.clone()
    for i in range(3):
        logits = {n: torch.ones(2, *model.get_parameter(n).shape) for n in names}
        moments = {n: (torch.zeros_like(v), torch.zeros_like(v)) for n, v in logits.items()}
        for k in range(1 if i < 1 else 2):
            e, leaves, hards = [], [], []
            noises = {
                n: -torch.log(
                    -torch.log(torch.rand(v.shape, generator=generator_for(0, f"{n}/{k}", i)))
                )
                for n, v in logits.items()
            }
            for b in range(2):
                own = {n: v[b].clone().requires_grad_() for n, v in logits.items()}
                used = {}
                for n, v in own.items():
                    y = torch.sigmoid(v + noises[n][b])
                    used[n] = model.get_parameter(n) * ((y > 0.5).float() + y - y.detach())
                t = torch.full((1,), sampler._time(i))
                e.append(torch.func.functional_call(model, used, (x[b : b + 1], t)))
                leaves.append(own)
                hards.append({n: (v + noises[n][b]) > 0 for n, v in own.items()})
            clean = sampler.clean(x, torch.cat(e), i)
            F.relu(2.0 - reward(clean)).sum().backward()
            for n in names:  # AdamW by hand
                grad = torch.stack([own[n].grad for own in leaves])
                first = moments[n][0].mul_(0.9).add_(0.1 * grad)
                second = moments[n][1].mul_(0.999).add_(0.001 * grad.square())
                step = first / (1 - 0.9 ** (k + 1))
                scale = (second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
                logits[n] = logits[n] * (1 - 0.1 * 0.01) - 0.1 * step / scale
        for b in range(2):
            for n in names:
                assert torch.equal(found.masks[i][n][b], hards[b][n])
        x = sampler.advance(x, torch.cat(e).detach(), i)
    torch.testing.assert_close(found.images, x, rtol=1e-4, atol=1e-4)
    for name, before in unet().named_parameters():
        assert torch.equal(model.get_parameter(name), before)
    record = found.record(1, 0)
    assert sorted(record) == sorted(names) and 0 < record.sparsity() < 1
    with pytest.raises(InvalidArgument, match="no matrices"):
        search_masks(model, noise, condition, reward, sampler, ["inlet.weight"])
