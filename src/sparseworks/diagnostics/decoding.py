"""How fast a causal language model decodes, how large it is, and what it says: ours beside others.

Candidates take turns in short blocks after a rest, so that a noisy machine is fair to them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = ["Candidate", "measure_decoding"]

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
        saved: the runtime and the file or folder from which `decoding_runtimes.reopen` makes it
            anew.
    """

    name: str
    nbytes: int
    prompt: Callable[[list[int]], Any]
    step: Callable[[int], Any]
    losses: Callable[[Tensor], Tensor] | None = None
    saved: tuple[str, str] | None = None


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
