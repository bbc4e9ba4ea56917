"""`sw.sparsify_trainer`: transforms and losses of one's own inside the real Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import InvalidArgument

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Net(nn.Module):
    """A classifier in the form that the Trainer takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows(count=64):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 12, generator=g), torch.randint(0, 3, (count,), generator=g)
    return [{"x": a, "labels": b} for a, b in zip(x, y)]


@pytest.fixture
def build(tmp_path):
    def made(folder="out", **changes):
        settings = {
            "output_dir": str(tmp_path / folder), "num_train_epochs": 3, "save_strategy": "steps",
            "per_device_train_batch_size": 8, "save_steps": 6, "logging_steps": 4, "seed": 3,
            "report_to": [], "use_cpu": True, "disable_tqdm": True, "weight_decay": 0.1,
            "learning_rate": 0.01, "dataloader_pin_memory": False, **changes,
        }  # fmt: skip
        return transformers.Trainer(
            Net(), transformers.TrainingArguments(**settings), train_dataset=rows()
        )

    return made


def in_order(trainer):
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )


METHODS = {
    "maskllm": {"pattern": "2:4", "include": "body*"},
    "jackpots": {"sparsity": 0.6},
    "sltrain": {"sparsity": 0.9, "rank": 4},
    "ast": {"pattern": "2:4", "include": "body*"},
    "gradual": {"sparsity": 0.6, "every": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_trains_sparse_and_resumes_exactly(method, build, tmp_path):
    first = build()
    callback = sw.sparsify_trainer(first, method, **METHODS[method])
    first.train()
    model = first.model
    assert callback.run.finished and callback.run.step == 24
    assert sw.masks(model).violations(model) == {}
    assert not any("parametrizations" in n for n, _ in model.named_parameters())
    again = build()
    sw.sparsify_trainer(again, method, **METHODS[method])
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-12"))
    a, b = model.state_dict(), again.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["maskllm", "jackpots"])
def test_takes_the_steps_of_a_plain_loop(method, build):
    """AdamW with a linear schedule, in which no decay pulls what the method added."""
    trainer = build(save_strategy="no")
    in_order(trainer)
    sw.sparsify_trainer(trainer, method, **METHODS[method])
    trainer.train()
    plain = Net()
    job = sw.transform(plain, method, steps=24, **METHODS[method])
    added = {id(p) for p in job.added.values()}
    decays = {True: [], False: []}
    for name, p in plain.named_parameters():
        if p.requires_grad:
            decays[id(p) not in added and not name.endswith("bias")].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": decays[d], "weight_decay": 0.1 * d} for d in (True, False) if decays[d]], 0.01
    )
    job.attach(optimizer)
    data = rows()
    for step in range(24):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 24)
        batch = data[step % 8 * 8 : step % 8 * 8 + 8]
        optimizer.zero_grad()
        x, y = (torch.stack([row[k] for row in batch]) for k in ("x", "labels"))
        (plain(x, y)["loss"] + job.penalty()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    job.finish()
    for (name, p), q in zip(trainer.model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loss_of_ones_own_is_the_mean_of_its_micro_batches(accumulate, build):
    """Equal steps by whole batches and by accumulated ones, and both as a plain loop."""
    teacher = Net()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.3)
    loss = sw.Distillation(teacher=teacher, task=0.3, kl=0.7, temperature=2.0)
    trainer = build(
        per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
        save_strategy="no", max_steps=4, lr_scheduler_type="constant", weight_decay=0.0,
        optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    in_order(trainer)
    sw.sparsify_trainer(trainer, None, loss=loss)
    trainer.train()
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), 0.01)
    data = rows()
    for step in range(4):
        batch = data[step * 8 : step * 8 + 8]
        optimizer.zero_grad()
        inputs = {k: torch.stack([row[k] for row in batch]) for k in ("x", "labels")}
        loss(plain, inputs).backward()
        optimizer.step()
    for p, q in zip(trainer.model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_refusals_leave_the_model_as_it_was(build):
    trainer = build()
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(InvalidArgument, match="every"):
        sw.sparsify_trainer(trainer, "gradual", sparsity=0.5, every=100)
    with pytest.raises(InvalidArgument, match="sparsity"):
        sw.sparsify_trainer(trainer, "jackpots")
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    with pytest.raises(InvalidArgument, match="make its own"):
        sw.sparsify_trainer(trainer, "jackpots", sparsity=0.5)
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


def test_a_transform_goes_through_one_training(build):
    trainer = build(max_steps=4, save_strategy="no")
    sw.sparsify_trainer(trainer, "jackpots", sparsity=0.5)
    trainer.train()
    with pytest.raises(InvalidArgument, match="anew"):
        trainer.train()


@pytest.mark.parametrize("method", ["ast", "maskllm"])
def test_trainers_of_trl(method, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = tiny_models.letters(eos_token="z", pad_token="[UNK]")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=12, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        gradient_accumulation_steps=2, gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    said = [{"prompt": f"a {w}", "completion": f" is {w}"} for w in ("fox", "dog", "sun", "sea")]
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(said * 4),
        processing_class=tokenizer,
    )  # fmt: skip
    teacher = copy.deepcopy(model)
    sw.sparsify_trainer(
        trainer, method, pattern="2:4", loss=sw.Distillation(teacher=teacher, task=0.5, kl=0.5)
    )
    trainer.train()
    assert sw.masks(model).violations(model) == {} and sw.masks(model).sparsity() == 0.5
