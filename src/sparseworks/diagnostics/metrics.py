"""Metrics: what pruning cost, as a number with a name, a unit and a direction.

| name | model | value |
| --- | --- | --- |
| perplexity | causal language models | exp(mean next-token loss), windows without overlap |
| fidelity | encoders | mean cosine between dense and sparse sentence embeddings |
| retrieval | encoders | share of docstring summaries whose nearest body is their own |
| accuracy | classifiers | share of right labels |
| pq-index, gini | all | how unevenly the surviving weights are spread |
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.diagnostics.indices import gini_metric, pq_metric
from sparseworks.diagnostics.metric import Metric
from sparseworks.models.calls import Batch, call, logits_of, move, split

__all__ = [
    "NAMES",
    "Metric",
    "accuracy",
    "check_name",
    "divergence",
    "embed",
    "fidelity",
    "get_metric",
    "load_function",
    "perplexity",
    "retrieval",
]


NAMES = ("perplexity", "fidelity", "retrieval", "accuracy", "pq-index", "gini")


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def perplexity(batches: Sequence[Batch]) -> Metric:
    """exp of the mean cross-entropy of tokens 2..T of every window, all tokens equal.

    Args:
        batches: `input_ids` windows, `[batch, tokens]`.
    """
    if not batches:
        raise DataError("perplexity: no evaluation windows")

    def measure(model: nn.Module) -> float:
        total, count = 0.0, 0
        for batch in batches:
            inputs, _ = split(move(batch, _device(model)))
            ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
            logits = logits_of(call(model, inputs)).float()
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            total += float(loss)
            count += ids[:, 1:].numel()
        return math.exp(min(total / count, 700.0))

    return Metric("perplexity", "", False, measure)


def accuracy(batches: Sequence[Batch]) -> Metric:
    """Share of samples whose largest logit is the label, in percent."""
    if not batches:
        raise DataError("accuracy: no evaluation batches")

    def measure(model: nn.Module) -> float:
        right, count = 0, 0
        for batch in batches:
            moved = move(batch, _device(model))
            _, target = split(moved)
            if target is None:
                raise DataError("accuracy: the batches carry no labels")
            right += int((logits_of(call(model, moved)).argmax(-1) == target).sum())
            count += target.numel()
        return 100.0 * right / count

    return Metric("accuracy", "%", True, measure)


def embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Sentence embeddings `[sentences, width]`: mean over tokens, normalised to length 1."""
    parts = []
    for batch in batches:
        moved = move(batch, _device(model))
        inputs, _ = split(moved)
        output = call(model, moved)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise DataError(f"{type(model).__name__} gives no last_hidden_state to embed with")
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        weight = torch.ones(hidden.shape[:2]) if mask is None else mask
        weight = weight[..., None].to(hidden)
        parts.append(F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1).float())
    return torch.cat(parts)


def fidelity(dense: nn.Module, batches: Sequence[Batch]) -> Metric:
    """Mean cosine between the embeddings of this model and those of the dense one.

    The dense embeddings are computed now, so the dense model may be pruned in place afterwards.
    """
    reference: list[Tensor] = []

    def measure(model: nn.Module) -> float:
        return float((embed(model, batches) * reference[0]).sum(-1).mean())

    metric = Metric("fidelity", "", True, measure)
    with torch.no_grad():
        training = dense.training
        reference.append(embed(dense.eval(), batches))
        dense.train(training)
    return metric


def divergence(dense: nn.Module, batches: Sequence[Batch]) -> Metric:
    """Mean Kullback-Leibler divergence of next-token distributions, dense to this, nats a token.

    Where two models differ little it tells what perplexity cannot: every token counts the change of
    the whole distribution, not only of the probability of the token that came.

    Args:
        dense: asked now, so it may be changed in place afterwards.
        batches: `input_ids` windows, `[batch, tokens]`.
    """

    @torch.no_grad()
    def told(model: nn.Module, batch: Batch) -> Tensor:
        inputs, _ = split(move(batch, _device(model)))
        return F.log_softmax(logits_of(call(model, inputs)).float(), -1).flatten(0, -2)

    reference = [told(dense, batch) for batch in batches]

    def measure(model: nn.Module) -> float:
        total, count = 0.0, 0
        for batch, wanted in zip(batches, reference):
            found = told(model, batch)
            total += float(F.kl_div(found, wanted, log_target=True, reduction="sum"))
            count += len(found)
        return total / count

    return Metric("divergence", " nats", False, measure)


def retrieval(queries: Sequence[Batch], documents: Sequence[Batch]) -> Metric:
    """Share of queries, in percent, whose most similar document is the one of the same place."""

    def measure(model: nn.Module) -> float:
        similarity = embed(model, queries) @ embed(model, documents).t()
        right = similarity.argmax(1) == torch.arange(len(similarity), device=similarity.device)
        return 100.0 * float(right.float().mean())

    return Metric("retrieval", "%", True, measure)


def load_object(spec: str) -> Any:
    """What "file.py:name" names.

    Raises:
        InvalidArgument: no such file or name.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise InvalidArgument(f"{spec!r}: no such file; give file.py:function")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise InvalidArgument(f"{spec!r}: {path.name} has no {name!r}")
    return getattr(module, name)


def load_function(spec: str) -> Callable[..., Any]:
    """The function of "file.py:name".

    Raises:
        InvalidArgument: no such file or function.
    """
    found = load_object(spec)
    if not callable(found):
        raise InvalidArgument(f"{spec!r} is no function")
    function: Callable[..., Any] = found
    return function


def check_name(name: str) -> None:
    """Refuse what `get_metric` does not know.

    Raises:
        InvalidArgument: neither one of `NAMES` nor a function of a file that is there.
    """
    if ".py:" in name:
        load_function(name)
    elif name not in NAMES:
        raise InvalidArgument(
            f"unknown metric {name!r}; use {', '.join(NAMES)} or file.py:function"
        )


def get_metric(
    name: str | Metric | Callable[[nn.Module], float],
    *,
    model: nn.Module,
    tokenizer: Any = None,
    data: Any = None,
    samples: int | None = None,
    length: int = 256,
) -> Metric:
    """A metric from its name, "file.py:function", or a callable `(model) -> float`.

    Args:
        name: see the table of this module.
        model: the dense model (fidelity compares with it).
        tokenizer: for text metrics.
        data: evaluation source as `sparseworks.data.load` takes it; None: the built-in
            docstrings that calibration does not use.
        samples: windows, sentences or images; None: all (text: 500).
        length: tokens of a window.

    Raises:
        InvalidArgument: unknown name, or something it needs is missing.
    """
    from sparseworks.data import load, passages
    from sparseworks.data.builtin import docstrings

    if isinstance(name, Metric):
        return name
    if callable(name):
        return Metric(getattr(name, "__name__", "metric"), "", True, name)
    if ".py:" in name:
        return Metric(name.rpartition(":")[2], "", True, load_function(name))
    check_name(name)
    if name == "perplexity":
        source = data if data is not None else "docstrings"
        return perplexity(
            load(source, tokenizer=tokenizer, split="evaluation", samples=samples, length=length)
        )
    if name == "accuracy":
        if data is None:
            raise InvalidArgument("metric 'accuracy' needs evaluation data: images with labels")
        return accuracy(load(data, split="evaluation", samples=samples, batch_size=100))
    if name == "fidelity":
        if data is not None:
            return fidelity(model, load(data, tokenizer=tokenizer, kind="passages", length=128,
                                        split="evaluation", samples=samples or 500))  # fmt: skip
        held = docstrings()[1::2]
        texts = [f"{d.summary} {d.body}" for d in held[: samples or 500]]
        return fidelity(model, passages(texts, tokenizer, length=128))
    if name == "retrieval":
        held = docstrings()[1::2][: samples or 500]
        queries = passages([d.summary for d in held], tokenizer, length=128)
        return retrieval(queries, passages([d.body for d in held], tokenizer, length=128))
    return pq_metric() if name == "pq-index" else gini_metric()
