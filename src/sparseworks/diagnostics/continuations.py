"""What a causal language model says next: greedy continuations of held-out text.

A prompt is the beginning of a window of the text that perplexity is measured on; prompts are spread
evenly over it. Greedy: always the likeliest token, so that two models differ by weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseworks.models.modes import evaluating

__all__ = ["Prompts", "held_out_prompts"]

_WINDOWS, _WINDOW = 64, 256  # as perplexity takes them


@dataclass(frozen=True)
class Prompts:
    """Beginnings of texts.

    Attributes:
        ids: `[texts, tokens]`.
        tokenizer: of the model.
        new: tokens that are said after them at most.
    """

    ids: Tensor
    tokenizer: Any
    new: int

    @torch.no_grad()
    def continued(self, model: Any) -> list[str]:
        """What the model says after each."""
        device = next(model.parameters()).device
        ids = self.ids.to(device)
        pad = self.tokenizer.pad_token_id
        with evaluating(model):
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.new, num_beams=1,
                do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            )  # fmt: skip
        return self._texts(found[:, ids.shape[1] :])

    def beside(self, dense: Sequence[str], pruned: Sequence[str]) -> list[dict[str, str]]:
        """A row for each prompt: what it was, and what both models say."""
        return [
            {"prompt": p, "dense": d, "pruned": s}
            for p, d, s in zip(self._texts(self.ids), dense, pruned, strict=True)
        ]

    def _texts(self, ids: Tensor) -> list[str]:
        made: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return made


def held_out_prompts(
    model: Any,
    tokenizer: Any,
    data: Any = None,
    *,
    count: int = 3,
    tokens: int = 32,
    new: int = 48,
) -> Prompts | None:
    """Prompts that calibration has not seen; None where the model generates no text.

    Args:
        model: where it has no `generate`, or no tokenizer, there are none.
        tokenizer: of the model, or None.
        data: evaluation text as `sparseworks.data.load` takes it; None: built-in docstrings.
        count: of prompts at most; 0: none.
        tokens: of each.
        new: tokens that are said after them.

    Raises:
        DataError: the text is missing, or shorter than a window.
    """
    can = getattr(model, "can_generate", None)
    if count < 1 or tokenizer is None or can is None or not can():
        return None
    from sparseworks.data import load

    source = "docstrings" if data is None else data
    found = load(source, tokenizer=tokenizer, kind="windows", split="evaluation",
                 samples=_WINDOWS, length=_WINDOW)  # fmt: skip
    windows = torch.cat([b["input_ids"] for b in found])
    count = min(count, len(windows))
    places = [i * len(windows) // count for i in range(count)]
    return Prompts(windows[places, :tokens], tokenizer, new)
