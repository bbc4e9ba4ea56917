"""What `sparseworks recipe` tries, and why: what our measured tables came to.

| models | in this order | because |
| --- | --- | --- |
| language models | integers alone | decoding waits for memory: int4 halves what int8 takes |
| | SparseGPT and int4 or int8 | half of the weights again, at a price in quality |
| encoders, CNNs | int8 and bf16 alone | nothing is lost, and half of the time or less is left |
| | SparseGPT (magnitude without data) in int8, bf16, fp32 | zeros are skipped beside that |
| | slimmed, and then pruned | for any runtime; without training it costs most quality |
| | rounded, alone and pruned | the smallest files |

Training after pruning recovers most of what it loses; it takes longer than a search should, so it
is named, not tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sparseworks.diagnostics.goals import Rung

__all__ = ["ladders_for", "not_tried"]

_SPARSITIES = ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "0.95")
_FLOPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def ladders_for(
    kind: str, dtypes: Sequence[str], *, data: bool, slims: bool = True
) -> list[list[Rung]]:
    """Ladders, the most promising first.

    Args:
        kind: "causal", "encoder" or "classifier".
        dtypes: to run in, exact ones first: ("fp32", "bf16", "int8").
        data: is there calibration data?
        slims: may units be cut?
    """
    pruner = "sparsegpt" if data else "magnitude:budget=global"
    cheap_first = list(reversed(dtypes))
    ladders = [[Rung("dense", "", (), d) for d in dtypes]]
    ladders += [_pruned(pruner, d) for d in cheap_first]
    if slims and kind != "causal":
        ladders += [[Rung(f"group-norm, {d}", "group-norm", (("flops", f),), d) for f in _FLOPS]
                    for d in cheap_first[:1]]  # fmt: skip
        text = f"group-norm:flops=0.8+{pruner}"
        ladders.append([Rung(f"{text}, {cheap_first[0]}", text, (("sparsity", s),), cheap_first[0])
                        for s in _SPARSITIES])  # fmt: skip
    if kind != "causal":
        bits = [Rung("rounding", "rounding", (("bits", b),), cheap_first[0]) for b in (8, 4)]
        text = f"{pruner}+rounding:bits=8"
        ladders += [bits, [Rung(text, text, (("sparsity", s),), cheap_first[0])
                           for s in _SPARSITIES]]  # fmt: skip
    if kind == "causal":
        ladders.append([Rung(f"{pruner} 2:4, {d}", pruner, (("sparsity", "2:4"),), d)
                        for d in dtypes if d != "bf16"])  # fmt: skip
    return ladders


def _pruned(pruner: str, dtype: str) -> list[Rung]:
    """From the dense model on."""
    zeros = [Rung(f"{pruner}, {dtype}", pruner, (("sparsity", s),), dtype) for s in _SPARSITIES]
    return [Rung("dense", "", (), dtype), *zeros]


def not_tried(loaded: Any, options: Any) -> Iterator[str]:
    """What would be worth trying and takes training, as commands."""
    if loaded.kind == "causal" or loaded.tokenizer is not None:
        yield (
            f"training on after pruning: sparseworks finetune {options.model} --data DATA "
            "--method sparsegpt --sparsity 0.7 --teacher start --out OUT"
        )
    else:
        yield (
            f"training sparse: sparseworks train {options.model} --data DATA --method gradual "
            "--sparsity 0.9 --out OUT"
        )
    yield f"other methods beside these: sparseworks compare {options.model} --latency --out OUT"
