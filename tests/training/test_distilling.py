"""Distillation: the loss by loops in fp64, padding, features of blocks, and use beside methods."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.calls import default_loss
from sparseworks.training.distilling import Distillation, square_head


def llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                    num_key_value_heads=1, intermediate_size=24)
    ).eval()  # fmt: skip


def ids(rows=3, length=7, seed=0):
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(real, extra=4):
    """The same tokens with padding on the right."""
    rows, length = real.shape
    return {
        "input_ids": torch.cat([real, torch.full((rows, extra), 3)], 1),
        "attention_mask": torch.cat([torch.ones(rows, length), torch.zeros(rows, extra)], 1).long(),
    }


def test_square_head_is_the_loop():
    g = torch.Generator().manual_seed(0)
    student = [torch.randn(2, 5, 4, generator=g) for _ in range(3)]
    teacher = [10.0**i * torch.randn(2, 5, 4, generator=g) for i in range(3)]
    tokens = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    total = raw = 0.0
    for s, t in zip(student, teacher):
        error = energy = count = 0.0
        for b in range(2):
            for i in range(5):
                if not tokens[b, i]:
                    continue
                for c in range(4):
                    error += (float(s[b, i, c]) - float(t[b, i, c])) ** 2
                    energy += float(t[b, i, c]) ** 2
                    count += 1
        total += (error / count) / (energy / count + 2**-7)
        raw += error / count
    assert float(square_head(student, teacher, tokens)) == pytest.approx(total, rel=1e-5)
    found = square_head(student, teacher, tokens, normalized=False)
    assert float(found) == pytest.approx(raw, rel=1e-5)
    assert float(square_head(teacher, teacher)) == 0.0
    zero = [torch.zeros_like(t) for t in teacher]
    assert float(square_head(zero, teacher)) == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("weights", [{"kl": 1.0, "temperature": 2.0}, {"squarehead": 1.0},
                                     {"features": 0.5}])  # fmt: skip
def test_padding_does_not_count(weights):
    teacher, student = llama(), llama(1)
    loss = Distillation(teacher=teacher, task=0.3, **weights)
    plain = loss(student, {"input_ids": ids()})
    torch.testing.assert_close(loss(student, padded(ids())), plain)
    assert float(plain.detach()) > 0.3 * float(default_loss(student, {"input_ids": ids()}).detach())


def test_the_blocks_are_found_and_the_loss_is_that_of_their_outputs():
    teacher, student = llama(), llama(1)
    loss = Distillation(teacher=teacher, task=0.0, squarehead=1.0)
    batch = {"input_ids": ids()}
    found = loss(student, batch).detach()
    assert loss.blocks == tuple(f"model.layers.{i}" for i in range(3))
    assert not any(m._forward_hooks for m in [*student.modules(), *teacher.modules()])
    with torch.no_grad():  # of hidden states the last has passed the norm: two of three compare
        ours = student(**batch, output_hidden_states=True).hidden_states[1:3]
        theirs = teacher(**batch, output_hidden_states=True).hidden_states[1:3]
    two = Distillation(teacher=teacher, task=0.0, squarehead=1.0, blocks=loss.blocks[:2])
    torch.testing.assert_close(two(student, batch), square_head(ours, theirs))
    assert float(found) > float(two(student, batch).detach())


def test_logits_are_compared_where_there_are_labels():
    teacher, student = llama(), llama(1)
    labels = ids(seed=2)
    labels[:, :4] = -100
    batch = {"input_ids": ids(), "labels": labels}
    found = Distillation(teacher=teacher, task=0.0, kl=1.0, temperature=3.0)(student, batch)
    found = found.detach()
    with torch.no_grad():
        a, b = student(ids()).logits.double(), teacher(ids()).logits.double()
    rows = []
    for row in range(3):
        for i in range(3, 6):  # predicts token i + 1
            p, q = (b[row, i] / 3).softmax(0), (a[row, i] / 3).softmax(0)
            rows.append(9 * float((p * (p / q).log()).sum()))
    assert float(found) == pytest.approx(sum(rows) / len(rows), rel=1e-4)


def test_a_student_that_is_its_teacher_pays_for_the_task_alone():
    model = llama()
    batch = {"input_ids": ids()}
    loss = Distillation(teacher=model, kl=1.0, squarehead=1.0)(copy.deepcopy(model), batch)
    torch.testing.assert_close(loss, default_loss(model, batch))


def test_the_teacher_stays_as_it_is_and_computes_in_half_on_request():
    teacher, student = llama().train(), llama(1).train()
    batch = {"input_ids": ids()}
    before = copy.deepcopy(teacher.state_dict())
    loss = Distillation(teacher=teacher, kl=1.0, squarehead=1.0)
    loss(student, batch).backward()
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    half = Distillation(teacher=teacher, kl=1.0, squarehead=1.0, half=True)
    assert next(half.teacher.parameters()).dtype == torch.bfloat16
    assert next(teacher.parameters()).dtype == torch.float32
    torch.testing.assert_close(half(student, batch), loss(student, batch), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("method,options", [
    ("sr-ste", {}), ("ast", {"steps": 12}), ("rigl", {"sparsity": 0.5, "steps": 12}),
    ("bdwp", {"pattern": "2:4"}), ("squarehead", {}), ("cast", {"steps": 12}),
])  # fmt: skip
def test_every_kind_of_training_takes_it(method, options):
    model = llama()
    loss = Distillation(teacher=copy.deepcopy(model), kl=1.0, squarehead=1.0)
    if method == "squarehead":
        sw.prune(model, "magnitude", sparsity=0.5)
        kept = sw.masks(model)
    if method == "cast":
        run = sw.transform(model, method, **options)
        optimizer = torch.optim.AdamW(run.parameter_groups(), 3e-3)
        run.attach(optimizer)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        run = sw.sparsify(model, optimizer, method, **options)
    for group in optimizer.param_groups:  # rules whose first steps are ten times those of Adam
        group["lr"] = 3e-4 if method in ("ast", "cast") else 3e-3
    batch, seen = {"input_ids": ids(8, 12)}, []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        seen.append(float(value.detach()))
    record = run.finish()
    assert seen[-1] < seen[0] and record.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert sw.masks(model).violations(model) == {}
    if method == "squarehead":
        assert all(torch.equal(record[n], kept[n]) for n in kept)


def test_images_have_features_too():
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))

    x, y = torch.randn(6, 3, 6, 6), torch.randint(0, 5, (6,))
    teacher, student = net(0), net(1)
    loss = Distillation(teacher=teacher, features=1.0, blocks=("0",), label_smoothing=0.1)
    expected = nn.functional.cross_entropy(student(x), y, label_smoothing=0.1)
    expected = expected + (student[0](x) - teacher[0](x)).square().mean()
    torch.testing.assert_close(loss(student, (x, y)), expected)
    with pytest.raises(ModelError, match="no repeated blocks"):
        Distillation(teacher=teacher, features=1.0)(student, (x, y))
    wider = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    with pytest.raises(ModelError, match="differ in shape"):
        loss(wider, (x, y))


@pytest.mark.parametrize(
    "weights,message",
    [
        ({"kl": -1.0}, "at least 0"),
        ({"task": 0.0}, "not all 0"),
        ({"temperature": 0.0}, "positive"),
        ({"blocks": ("7",)}, "no module '7'"),
    ],
)
def test_misuse(weights, message):
    with pytest.raises(InvalidArgument, match=message):
        Distillation(teacher=nn.Sequential(nn.Linear(2, 2)), **weights)
    with pytest.raises(InvalidArgument, match="no 'kd'"):
        Distillation.of({"kd": 1.0}, nn.Linear(2, 2))
