"""Small Llamas over bytes from scratch, and the memory that a training step of a wider one takes.

Memory is read from the process, not computed: a child process of one thread builds the model, takes
a few steps, and tells its largest resident size since they began, less what it had after its
imports. glibc is told to give freed tensors back (`MALLOC_MMAP_THRESHOLD_`), so that the size is
that of what is alive.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.diagnostics.memory import begin_peak, kilobytes, told

__all__ = ["WIDE", "small_llama", "step_memory"]

WIDE = {"width": 768, "layers": 4, "feedforward": 2048, "heads": 8}
"""The model whose steps are measured: 28M parameters in its blocks."""


def small_llama(
    seed: int = 0, width: int = 96, layers: int = 2, feedforward: int = 256, heads: int = 4
) -> nn.Module:
    """A Llama over 256 byte values as transformers has it, initialised as it does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, num_hidden_layers=layers, intermediate_size=feedforward,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256,
        use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


def step_memory(
    method: str = "dense", optimizer: str = "adamw", *, tokens: int = 64, steps: int = 3,
    size: Mapping[str, int] = WIDE, **settings: Any,
) -> float:  # fmt: skip
    """Megabytes that training takes at its peak: weights, gradients, optimizer, activations.

    Args:
        method: of kind "hooked" or "transform", or "dense".
        optimizer: "adamw", or "module:class" of another one, with the options after a space.
        tokens: of the one window of a step.
        steps: taken; optimizers make their state in the first one.
        size: of the Llama.
        settings: of the method.

    Raises:
        InvalidArgument: the system tells no resident sizes (it is not Linux).
        DataError: the child process failed.
    """
    if not told():
        raise InvalidArgument("memory is measured on Linux alone (/proc/self/status is missing)")
    given = {"method": method, "optimizer": optimizer, "tokens": tokens, "steps": steps,
             "size": dict(size), "settings": settings}  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    code = "from sparseworks.diagnostics.small_llamas import _child; _child()"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(given), env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise DataError(f"measuring the memory of {method!r} failed: {done.stderr[-800:]}")
    return float(done.stdout.split()[-1])


def _child() -> None:
    import importlib

    from sparseworks.training.planning import Sparse

    given = json.load(sys.stdin)
    small = small_llama(width=16, layers=1, feedforward=16, heads=1)  # what a first use loads
    small(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    torch.optim.AdamW(small.parameters()).step()
    torch.linalg.svd(torch.randn(8, 8))
    del small
    before = kilobytes("VmRSS")
    model = small_llama(**given["size"]).train()

    def build(parameters: Any) -> torch.optim.Optimizer:
        path, _, options = given["optimizer"].partition(" ")
        if path == "adamw":
            return torch.optim.AdamW(parameters, 1e-3)
        module, _, name = path.partition(":")
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(
            parameters, lr=1e-3, **json.loads(options or "{}")
        )
        return made

    if given["method"] == "dense":
        optimizer = build(model.parameters())
    else:
        sparse = Sparse(given["method"], settings=given["settings"])
        _, optimizer = sparse.begin(model, given["steps"] + 1, build)
    begin_peak()
    ids = torch.randint(256, (1, given["tokens"]), generator=torch.Generator().manual_seed(0))
    for _ in range(given["steps"]):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    print((kilobytes("VmHWM") - before) / 1000)
