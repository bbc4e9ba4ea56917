"""Continuations are those that the likeliest token each time gives, of text that is held out."""

from __future__ import annotations

import pytest
import torch

import sparseworks as sw
import tiny_models
from sparseworks.data import load
from sparseworks.diagnostics.continuations import held_out_prompts

transformers = pytest.importorskip("transformers")


class Letters:
    """A tokenizer of the 60 first printable characters; 63 ends a text."""

    pad_token_id, eos_token_id = None, 63

    def __call__(self, text, add_special_tokens=True, verbose=True, **_):
        return {"input_ids": [min(ord(c), 91) - 32 if ord(c) >= 32 else 0 for c in text]}

    def batch_decode(self, ids, skip_special_tokens=True):
        return ["".join(chr(i + 32) for i in row if i != 63) for row in ids.tolist()]


def greedy(model, ids, new):
    """A token at a time, without a cache, until the text ends."""
    said = []
    for _ in range(new):
        with torch.no_grad():
            token = int(model(torch.cat([ids, torch.tensor(said, dtype=ids.dtype)])[None])
                        .logits[0, -1].argmax())  # fmt: skip
        said.append(token)
        if token == 63:
            break
    return "".join(chr(i + 32) for i in said if i != 63)


def sharp():
    """Of large weights, so that its likeliest tokens are not all the same; 63 ends a text."""
    model = tiny_models.language_model(eos_token_id=63, pad_token_id=63, bos_token_id=62)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    model.generation_config.do_sample = True  # what a model brings is no reason to draw lots
    return model


@pytest.mark.parametrize("training", [False, True])
def test_the_likeliest_token_each_time(training):
    model = sharp().train(training)
    prompts = held_out_prompts(model, Letters(), count=4, tokens=10, new=12)
    assert prompts.ids.shape == (4, 10)
    dense = prompts.continued(model)
    assert dense == [greedy(model.eval(), row, 12) for row in prompts.ids]
    assert len(set(dense)) > 1 and max(map(len, dense)) > 1
    sw.prune(model, "magnitude", sparsity=0.7)
    pruned = prompts.continued(model)
    assert pruned == [greedy(model, row, 12) for row in prompts.ids] and pruned != dense
    rows = prompts.beside(dense, pruned)
    assert [r["dense"] for r in rows] == dense and [r["pruned"] for r in rows] == pruned
    assert [r["prompt"] for r in rows] == Letters().batch_decode(prompts.ids)


def test_the_prompts_begin_windows_that_are_held_out():
    model = tiny_models.language_model()
    windows = load("docstrings", tokenizer=Letters(), split="evaluation", samples=64)
    windows = torch.cat([b["input_ids"] for b in windows])
    prompts = held_out_prompts(model, Letters(), count=4, tokens=20)
    assert torch.equal(prompts.ids, windows[[0, 16, 32, 48], :20])
    few = held_out_prompts(model, Letters(), count=100)
    assert len(few.ids) == len(windows) == 64


def test_what_generates_nothing_has_no_prompts():
    assert held_out_prompts(tiny_models.net(), Letters()) is None
    assert held_out_prompts(tiny_models.language_model(), None) is None
    assert held_out_prompts(tiny_models.language_model(), Letters(), count=0) is None
