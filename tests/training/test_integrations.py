"""The callbacks inside real trainers: same masks as a plain loop, exact resumption, refusals."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument, MissingDependency
from tracked import READERS


class Net(nn.Module):
    """A classifier in the form that the Trainer takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh())
        self.head = nn.Linear(20, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows(count=64):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 10, generator=g), torch.randint(0, 3, (count,), generator=g)
    return [{"x": a, "labels": b} for a, b in zip(x, y)]


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def law(model):
    record = sw.masks(model)
    return record is not None and record.violations(model) == {}


# --- Hugging Face Trainer


@pytest.fixture
def trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def build(callback, folder="out", **changes):
        settings = {
            "output_dir": str(tmp_path / folder), "num_train_epochs": 3, "save_strategy": "steps",
            "per_device_train_batch_size": 8, "save_steps": 6, "logging_steps": 4, "seed": 3,
            "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 1.0,
            "weight_decay": 0.1, "learning_rate": 0.01, "dataloader_pin_memory": False, **changes,
        }  # fmt: skip
        model = Net()
        return model, transformers.Trainer(
            model,
            transformers.TrainingArguments(**settings),
            train_dataset=rows(),
            eval_dataset=rows(16),
            callbacks=[callback],
        )

    return build


@pytest.mark.parametrize("method", ["gradual", "rigl", "granet", "set"])
def test_the_trainer_trains_sparse_and_resumes_exactly(method, trainer, tmp_path):
    def callback():
        return sw.trainer_callback(method, sparsity=0.8, every=2)

    first = callback()
    whole, whole_trainer = trainer(first)
    whole_trainer.train()
    assert law(whole) and first.run.finished and first.run.step == 24
    assert sw.masks(whole).sparsity() == pytest.approx(0.8, abs=2e-3)
    resumed, again = trainer(callback())
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-12"))
    assert equal(whole, resumed)
    assert all(torch.equal(sw.masks(whole)[n], sw.masks(resumed)[n]) for n in sw.masks(whole))


def test_the_trainer_takes_the_same_steps_as_a_plain_loop(trainer):
    """An independent loop: AdamW with the Trainer's linear schedule, without shuffling or decay."""
    callback = sw.trainer_callback("rigl", sparsity=0.8, every=2)
    model, made = trainer(callback, weight_decay=0.0, save_strategy="no")
    made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(made.train_dataset)
    made.train()
    plain = Net()
    optimizer = torch.optim.AdamW(plain.parameters(), 0.01, weight_decay=0.0)
    run = sw.sparsify(plain, optimizer, "rigl", sparsity=0.8, steps=24, every=2)
    data = rows()
    for step in range(24):
        batch = data[step % 8 * 8 : step % 8 * 8 + 8]
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 24)
        optimizer.zero_grad()
        x, y = (torch.stack([row[k] for row in batch]) for k in ("x", "labels"))
        plain(x, y)["loss"].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    run.finish()
    assert all(torch.equal(sw.masks(model)[n], sw.masks(plain)[n]) for n in sw.masks(plain))
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_best_checkpoint_comes_with_its_masks(trainer, tmp_path):
    callback = sw.trainer_callback("set", sparsity=0.8, every=1, end=1.0, fraction=0.9)
    model, made = trainer(
        callback, load_best_model_at_end=True, eval_strategy="steps", eval_steps=6,
        metric_for_best_model="lateness", greater_is_better=False,
    )  # fmt: skip
    made.compute_metrics = lambda _: {"lateness": made.state.global_step}  # the first is the best
    made.train()
    best = made.state.best_model_checkpoint
    assert best == str(tmp_path / "out" / "checkpoint-6")
    from safetensors.torch import load_file

    saved = load_file(f"{best}/model.safetensors")
    assert law(model)
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())


def test_the_trainer_refuses_what_cannot_be(trainer, tmp_path):
    with pytest.raises(InvalidArgument, match="did you mean 'rigl'"):
        sw.trainer_callback("rigel", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="needs `sparsity`"):
        sw.trainer_callback("rigl")
    with pytest.raises(InvalidArgument, match="is one-shot"):
        sw.trainer_callback("wanda", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="schedule ends at step 30, after the training"):
        trainer(sw.trainer_callback("gradual", sparsity=0.5, steps=30, every=2))[1].train()
    with pytest.raises(InvalidArgument, match="every 100 steps, but the training has 24"):
        trainer(sw.trainer_callback("gradual", sparsity=0.5, every=100))[1].train()
    trainer(sw.trainer_callback("rigl", sparsity=0.5, every=2))[1].train()
    with pytest.raises(InvalidArgument, match="the state is of method 'rigl'"):
        trainer(sw.trainer_callback("set", sparsity=0.5, every=2))[1].train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-12")
        )
    (tmp_path / "out" / "checkpoint-12" / "sparseworks.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no sparseworks"):
        trainer(sw.trainer_callback("rigl", sparsity=0.5, every=2))[1].train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-12")
        )


def test_stopping_early_is_named(trainer):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= 5

    model, made = trainer(sw.trainer_callback("gradual", sparsity=0.8, every=2))
    made.add_callback(Stop())
    with pytest.warns(UserWarning, match="stopped at step 5 of 24"):
        made.train()
    assert law(model)


# --- Accelerate


@pytest.mark.parametrize("method", ["gradual", "rigl"])
@pytest.mark.parametrize("prepared_first", [True, False])
def test_accelerate_accumulates_checkpoints_and_resumes(method, prepared_first, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def build():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        given = {"sparsity": 0.8, "steps": 12, "every": 2}
        if not prepared_first:
            run = sw.sparsify(model, optimizer, method, **given)
        model, optimizer = accelerator.prepare(model, optimizer)
        if prepared_first:
            run = sw.sparsify(model, optimizer, method, **given)
        accelerator.register_for_checkpointing(run)
        return accelerator, model, optimizer, run

    def train(parts, first, last):
        accelerator, model, optimizer, _ = parts
        data = rows()
        for i in range(first, last):
            with accelerator.accumulate(model):
                batch = data[i % 8 * 8 : i % 8 * 8 + 8]
                x, y = (torch.stack([row[k] for row in batch]) for k in ("x", "labels"))
                accelerator.backward(model(x, y)["loss"])
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    parts = build()
    train(parts, 0, 12)
    assert parts[3].step == 6
    parts[0].save_state(str(tmp_path / "state"))
    train(parts, 12, 24)
    again = build()
    again[0].load_state(str(tmp_path / "state"))
    train(again, 12, 24)
    assert parts[3].step == again[3].step == 12
    for made in (parts, again):
        assert made[3].finish().sparsity() == pytest.approx(0.8, abs=2e-3)
        assert law(made[1])
    assert equal(parts[1], again[1])


# --- Lightning


def lightning_loop(callback, model, optimizer, first, last, saved=None):
    """What Lightning calls, in its order: state, start, steps with a closure, end."""
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    trainer = types.SimpleNamespace(optimizers=optimizers, estimated_stepping_batches=12)
    if saved is not None:
        callback.load_state_dict(saved)
    callback.on_train_start(trainer, model)
    closures(model, optimizers, first, last)
    state = callback.state_dict()
    if last == 12:
        callback.on_train_end(trainer, model)
    return state


def trainer_loop(callback, model, optimizer, first, last):
    """What the Hugging Face Trainer calls, in its order, without its files."""
    state = types.SimpleNamespace(max_steps=12, global_step=first, best_model_checkpoint=None)
    args = types.SimpleNamespace(load_best_model_at_end=False)
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    closures(model, [optimizer], first, last)
    if last == 12:
        callback.on_train_end(args, state, None)


def closures(model, optimizers, first, last):
    """A loop whose optimizers call the model, as Lightning has it."""
    data = rows()
    for i in range(first, last):
        batch = data[i % 8 * 8 : i % 8 * 8 + 8]

        def closure(batch=batch):
            model.zero_grad()
            x, y = (torch.stack([row[k] for row in batch]) for k in ("x", "labels"))
            loss = model(x, y)["loss"]
            loss.backward()
            return loss

        for optimizer in optimizers:
            optimizer.step(closure)


@pytest.fixture
def callback_class(monkeypatch):
    """Lightning's Callback where it is installed, else a class in its place."""
    from sparseworks.training import integrations

    integrations._lightning_class.cache_clear()
    if not any(importlib.util.find_spec(n) for n in ("lightning", "pytorch_lightning")):
        module = types.ModuleType("pytorch_lightning")
        module.Callback = type("Callback", (), {})
        monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    yield
    integrations._lightning_class.cache_clear()


def test_the_lightning_callback_follows_its_hooks(callback_class):
    import copy

    def build():
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return sw.lightning_callback("rigl", sparsity=0.8, every=2), model, optimizer

    whole = build()
    lightning_loop(*whole, 0, 12)
    assert law(whole[1]) and whole[0].run.finished
    parts = build()
    state = copy.deepcopy(lightning_loop(*parts, 0, 6))
    again = build()
    again[1].load_state_dict(parts[1].state_dict())
    again[2].load_state_dict(copy.deepcopy(parts[2].state_dict()))
    lightning_loop(*again, 6, 12, saved=state)
    assert equal(whole[1], again[1])


def test_the_lightning_callback_follows_several_optimizers(callback_class):
    model = Net()
    pair = [torch.optim.SGD(m.parameters(), 0.1) for m in (model.body[:2], model.body[2:])]
    head = torch.optim.SGD(model.head.parameters(), 0.1)
    callback = sw.lightning_callback("rigl", sparsity=0.8, optimizer=(0, 2))
    lightning_loop(callback, model, [pair[0], head, pair[1]], 0, 12)
    assert callback.run.optimizers == tuple(pair) and callback.run.step == 12 and law(model)


@pytest.fixture
def loops(callback_class):
    """Callback and loop of both trainers."""
    pytest.importorskip("transformers")
    return {
        "lightning": (sw.lightning_callback, lightning_loop),
        "transformers": (sw.trainer_callback, trainer_loop),
    }


@pytest.mark.parametrize("method", ["gradual", "rigl"])
@pytest.mark.parametrize("failed_at", [None, 5])
@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_callback_serves_one_training_after_another(name, failed_at, method, loops):
    """Also after one that failed; the last is what it would be with a callback of its own."""
    make, loop = loops[name]

    def parts(model):
        return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    callback = make(method, sparsity=0.8)
    model, optimizer = parts(Net())
    loop(callback, model, optimizer, 0, failed_at or 12)
    first = callback.run
    assert failed_at or (law(model) and first.finished)
    model.load_state_dict(Net().state_dict())  # the same objects, with whatever hooks they have
    optimizer.state.clear()
    loop(callback, model, optimizer, 0, 12)
    own = parts(Net())
    loop(make(method, sparsity=0.8), *own, 0, 12)
    assert callback.run is not first and callback.run.finished and first.finished
    assert equal(model, own[0]) and law(model)
    assert sw.masks(model).sparsity() == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_the_trainer_reports_sparsity_and_flips(tracker, trainer, tmp_path, monkeypatch):
    """Into the same events and runs as the trainer's own figures, and into its history."""
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "out"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "out" / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sparseworks")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "out" / "tensorboard"))
    (tmp_path / "out").mkdir()
    callback = sw.trainer_callback("set", sparsity=0.8, every=2)
    _, made = trainer(callback, report_to=[tracker], save_strategy="no")
    made.train()
    if tracker == "wandb":
        __import__("wandb").finish()
    shown = READERS[tracker](tmp_path / "out")
    for name in ("sparsity", "flips"):
        kept = [(r["step"], r[name]) for r in made.state.log_history if name in r]
        assert (
            kept[:6] == [(step, pytest.approx(value)) for step, value in shown["train/" + name]][:6]
        )
        assert [step for step, _ in kept][:6] == [4, 8, 12, 16, 20, 24]
    assert kept[0][1] > 0


def test_a_real_trainer_twice(trainer):
    callback = sw.trainer_callback("gradual", sparsity=0.8)
    for folder in ("first", "second"):
        model, made = trainer(callback, folder=folder)
        made.train()
        assert law(model) and sw.masks(model).sparsity() == pytest.approx(0.8, abs=2e-3)
    made.train()  # the same trainer again
    assert law(model) and callback.run.finished and callback.run.step == 24


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def fit(request, tmp_path):
    """Trains 24 steps with one of Lightning's two packages, whichever class the callback has."""
    lightning = pytest.importorskip(request.param)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return self.net(batch["x"], batch["labels"])["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01)

    def trained(callback, folder, logger=False, epochs=3, **more):
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=logger, enable_progress_bar=False,
            gradient_clip_val=1.0, default_root_dir=str(tmp_path / folder), callbacks=[callback],
            log_every_n_steps=4, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=8), **more)
        return module, trainer

    return trained


def test_a_real_lightning_trainer_serves_twice(fit):
    callback = sw.lightning_callback("rigl", sparsity=0.8, steps=24, every=2)
    first, _ = fit(callback, "first")
    second, _ = fit(callback, "second")
    assert equal(first, second) and law(first) and law(second)
    assert sw.masks(second).sparsity() == pytest.approx(0.8, abs=2e-3)


def test_a_real_lightning_trainer_resumes_exactly(fit, tmp_path):
    callback = sw.lightning_callback("rigl", sparsity=0.8, steps=24, every=2)
    kept = tmp_path / "middle.ckpt"

    def save(trainer, module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(kept)

    callback.on_train_epoch_end = save
    whole, _ = fit(callback, "whole")
    own = sw.lightning_callback("rigl", sparsity=0.8, steps=24, every=2)
    resumed, trainer = fit(own, "again", ckpt_path=kept)
    assert trainer.global_step == own.run.step == 24
    assert equal(whole, resumed) and law(resumed)


def test_lightning_logs_sparsity_and_flips(fit, tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(str(tmp_path), "csv")
    callback = sw.lightning_callback("set", sparsity=0.8, every=2)
    fit(callback, "logged", logger=logger)
    lines = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    head, *told = (line.split(",") for line in lines)
    assert {"sparsity", "flips"} <= set(head)
    assert [float(row[head.index("step")]) for row in told] == [3, 7, 11, 15, 19, 23]
    for row in told:
        assert float(row[head.index("sparsity")]) == pytest.approx(0.8, abs=2e-3)
    assert any(float(row[head.index("flips")]) > 0 for row in told)


def test_without_the_package_the_extra_is_named(monkeypatch):
    from sparseworks.training import integrations

    integrations._lightning_class.cache_clear()
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match="pip install lightning"):
        sw.lightning_callback("rigl", sparsity=0.5)


def test_the_first_fsdp_is_refused_by_name():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = FullyShardedDataParallel(Net())
    with pytest.raises(InvalidArgument, match="fully_shard"):
        sw.sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "static", sparsity=0.5)
