"""How fast a causal language model decodes, how large it is, and what it says: ours beside others.

Candidates take turns in short blocks after a rest, so that a noisy machine is fair to them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, MissingDependency, ModelError

__all__ = ["DECODERS", "Candidate", "llama_cpp_candidate", "measure_decoding", "our_candidate",
           "transformers_candidate"]  # fmt: skip

DECODERS = ("llama.cpp", "transformers")
_BLOCK = 12  # tokens of a candidate's turn
_WARM = 3
_REST = 0.1  # seconds


@dataclass(frozen=True)
class Candidate:
    """One way to decode.

    Attributes:
        nbytes: of its weights, embeddings left out where they are only looked up.
        prompt: takes ids into a new text, and gives logits `[vocabulary]` of the next token.
        step: takes one more token, and gives the logits after it.
        losses: negative log likelihoods `[tokens - 1]` of a text, or None where it gives none.
    """

    name: str
    nbytes: int
    prompt: Callable[[list[int]], Any]
    step: Callable[[int], Any]
    losses: Callable[[Tensor], Tensor] | None = None


def our_candidate(name: str, decoder: Any) -> Candidate:
    """A compiled decoder."""
    from sparseworks.engine.decoder.generating import DecoderCache

    state: dict[str, Any] = {}

    def prompt(ids: list[int]) -> Tensor:
        past = DecoderCache(decoder.native)
        past.start(1, len(ids) + 1024)
        state["past"] = past
        return _next(decoder(torch.tensor([ids]), cache=past, logits_to_keep=1))

    def step(token: int) -> Tensor:
        return _next(decoder(torch.tensor([[token]]), cache=state["past"]))

    def losses(ids: Tensor) -> Tensor:
        return _losses(decoder(ids[None]).logits[0], ids)

    return Candidate(name, decoder.report.nbytes, prompt, step, losses)


def transformers_candidate(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Candidate:
    """The model itself, eager."""
    import copy

    twin: Any = copy.deepcopy(model).to(dtype).eval()
    state: dict[str, Any] = {}

    @torch.no_grad()
    def feed(ids: Tensor, past: Any) -> Tensor:
        out = twin(input_ids=ids, use_cache=True, logits_to_keep=1,
                   **({} if past is None else {state["name"]: past}))  # fmt: skip
        state["name"] = "cache" if out.get("cache") is not None else "past_key_values"
        state["past"] = out[state["name"]]
        return _next(out)

    @torch.no_grad()
    def losses(ids: Tensor) -> Tensor:
        return _losses(twin(input_ids=ids[None]).logits[0].float(), ids)

    table = twin.get_input_embeddings().weight
    shared = twin.get_output_embeddings().weight is table
    size = sum(p.nbytes for p in twin.parameters()) - (0 if shared else table.nbytes)
    kind = str(dtype).removeprefix("torch.")
    return Candidate(
        f"transformers {kind}", size, lambda ids: feed(torch.tensor([ids]), None),
        lambda token: feed(torch.tensor([[token]]), state["past"]), losses,
    )  # fmt: skip


def llama_cpp_candidate(model: nn.Module, type: str, threads: int, folder: Path) -> Candidate:
    """llama.cpp through llama-cpp-python, on a GGUF file of the model.

    Raises:
        MissingDependency: llama-cpp-python or gguf is not installed.
        ModelError: a family that is not written as GGUF here.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingDependency("llama.cpp: pip install llama-cpp-python gguf")
    import llama_cpp
    import numpy as np

    from sparseworks.io.gguf import export_gguf

    path = folder / f"{type}.gguf"
    export_gguf(model, path, type)
    config: Any = model.config
    context = min(4096, config.max_position_embeddings)
    engine: Any = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    table = model.get_input_embeddings().weight.numel() * 2  # type: ignore[operator]

    def logits() -> Any:
        found = llama_cpp.llama_get_logits(engine._ctx.ctx)
        return np.ctypeslib.as_array(found, shape=(config.vocab_size,))

    def prompt(ids: list[int]) -> Any:
        engine.reset()
        engine.eval(ids)
        return logits()

    def step(token: int) -> Any:
        engine.eval([token])
        return logits()

    def losses(ids: Tensor) -> Tensor:
        rows = [torch.from_numpy(prompt(ids[:1].tolist()).copy())]
        rows += [torch.from_numpy(step(t).copy()) for t in ids[1:-1].tolist()]
        return _losses(torch.stack([*rows, rows[-1]]), ids)

    return Candidate(f"llama.cpp {type}", os.path.getsize(path) - table, prompt, step, losses)


def measure_decoding(
    candidates: Sequence[Candidate],
    vocabulary: int,
    *,
    prompts: Sequence[int] = (64, 512),
    context: int = 0,
    repeat: int = 5,
    text: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Tokens a second of prompts and of decoding, and perplexity, for each candidate.

    Args:
        candidates: each is fed the same tokens.
        vocabulary: ids are drawn from it.
        prompts: lengths; a text of the first one is what decoding goes on from.
        context: tokens before decoding, instead of the first prompt's.
        repeat: turns of each.
        text: ids `[windows, tokens]` for perplexity.

    Returns:
        A row a candidate: name, bytes, tokens a second (medians, with 10th and 90th percentile of
        decoding), perplexity.
    """
    if repeat < 1 or not prompts:
        raise InvalidArgument("repeat and the number of prompts must be at least 1")
    generator = torch.Generator().manual_seed(0)
    longest = max(*prompts, context, 1)
    ids = torch.randint(3, vocabulary, (longest + _BLOCK,), generator=generator).tolist()
    steps: dict[str, list[float]] = {c.name: [] for c in candidates}
    taken: dict[str, dict[int, list[float]]] = {
        c.name: {p: [] for p in prompts} for c in candidates
    }
    for turn in range(repeat):
        for c in candidates:
            time.sleep(_REST)
            for length in sorted(prompts, reverse=True):
                if length > 128 and turn >= 2:
                    continue
                start = time.perf_counter()
                c.prompt(ids[:length])
                taken[c.name][length].append(time.perf_counter() - start)
            if context:
                c.prompt(ids[:context])
            for i in range(_WARM + _BLOCK):
                start = time.perf_counter()
                c.step(ids[i])
                if i >= _WARM:
                    steps[c.name].append(time.perf_counter() - start)
    rows = []
    for c in candidates:
        ordered = sorted(steps[c.name])
        row: dict[str, Any] = {
            "candidate": c.name, "bytes": c.nbytes, "context": context or prompts[0],
            "decode_tokens_per_second": 1 / statistics.median(ordered),
            "decode_p10": 1 / ordered[-1 - len(ordered) // 10],
            "decode_p90": 1 / ordered[len(ordered) // 10],
        }  # fmt: skip
        for length in prompts:
            row[f"prompt_{length}_tokens_per_second"] = length / statistics.median(
                taken[c.name][length]
            )
        if text is not None and c.losses is not None:
            found = torch.cat([c.losses(window) for window in text])
            row["perplexity"] = math.exp(float(found.double().mean()))
        rows.append(row)
    return rows


def _next(output: Any) -> Tensor:
    found: Tensor = output.logits[0, -1]
    return found


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")


def peers(
    model: nn.Module, names: Sequence[str], threads: int, folder: Path, notes: list[str],
    types: Sequence[str] = ("F16", "Q8_0", "Q4_0"),
) -> list[Candidate]:  # fmt: skip
    """The other runtimes that are there; `notes` says why one is not."""
    found: list[Candidate] = []
    for name in names:
        if name == "transformers":
            found.append(transformers_candidate(model))
            continue
        try:
            found += [llama_cpp_candidate(model, t, threads, folder) for t in types]
        except (MissingDependency, ModelError) as error:
            notes.append(f"{name}: {error}")
    return found
