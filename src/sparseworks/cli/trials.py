"""The trials of `sparseworks recipe`: of models that are called, and of those that decode."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from sparseworks.cli.trying import Trial
from sparseworks.core.errors import InvalidArgument

__all__ = ["trial_of"]

_REPEAT = 24  # calls that are timed
_WINDOWS, _WINDOW = 32, 256  # of the text whose perplexity is measured
_TURNS = 3  # of decoding


class CallTrial(Trial):
    """Of encoders and classifiers: the time of a call."""

    usual = ("fp32", "bf16", "int8")

    def __init__(self, options: Any, loaded: Any) -> None:
        from sparseworks.cli.examples import example_of
        from sparseworks.cli.preparing import one_metric
        from sparseworks.diagnostics.footprints import Yardstick
        from sparseworks.models.calls import Arguments

        super().__init__(options, loaded)
        example = example_of(loaded, options)
        if example is None:
            raise InvalidArgument(
                "nothing tells what the model is called with: give --input-shape, --data or "
                "--eval-data"
            )
        self.metric = one_metric(options, loaded)
        self.metric_name, self.unit = self.metric.name, self.metric.unit
        self.higher = self.metric.higher_is_better
        self.example = Arguments.of(example)
        self.yardstick = Yardstick(loaded.model, example, options.include, options.exclude)
        found = self.yardstick(loaded.model)
        self.dense = {"quality": self.metric(loaded.model), "bytes": found["bytes"],
                      "flops": found["flops"], "latency_ms": self._time(loaded.model)}  # fmt: skip

    def compiled(self, model: Any, dtype: str) -> Any:
        import sparseworks as sw
        from sparseworks.cli.loading import parse_precision

        return sw.compile(model, self.example, dtype=parse_precision(dtype))

    def measured(self, model: Any, dtype: str) -> dict[str, Any]:
        fast = self.compiled(model, dtype)
        found = self.yardstick(model)
        time, torch_time = self._beside(fast)
        return {"quality": self.metric(fast), "latency_ms": time, "speedup": torch_time / time,
                "bytes": found["bytes"], "flops": found["flops"]}  # fmt: skip

    def _time(self, model: Any) -> float:
        return statistics.median(self._turns({"one": model})["one"])

    def _beside(self, fast: Any) -> tuple[float, float]:
        """Of a compiled model, and of the dense one in torch, in turns."""
        times = self._turns({"fast": fast, "torch": self.loaded.model})
        return statistics.median(times["fast"]), statistics.median(times["torch"])

    def _turns(self, models: Mapping[str, Any]) -> dict[str, list[float]]:
        from sparseworks.diagnostics.turns import in_turn

        given = self.example
        calls = {n: (lambda m=m: m(*given.args, **given.kwargs)) for n, m in models.items()}
        return in_turn(calls, _REPEAT)


class DecodingTrial(Trial):
    """Of language models: the time of a token, by the native decoder."""

    usual = ("bf16", "int8", "int4")
    metric_name, unit, higher = "perplexity", "", False

    def __init__(self, options: Any, loaded: Any) -> None:
        from sparseworks.data import load
        from sparseworks.diagnostics.decoding_runtimes import transformers_candidate

        super().__init__(options, loaded)
        if loaded.tokenizer is None or options.metric not in (None, "perplexity"):
            raise InvalidArgument(
                "the quality of a language model is its perplexity here, for which it needs its "
                "tokenizer"
            )
        import torch

        windows = load(
            options.eval_data or "docstrings", tokenizer=loaded.tokenizer, kind="windows",
            split="evaluation", samples=options.eval_samples or _WINDOWS, length=_WINDOW,
        )  # fmt: skip
        self.text = torch.cat([b["input_ids"] for b in windows])
        self.peer = transformers_candidate(loaded.model, torch.float32)
        [found] = self._decoded([self.peer])
        self.dense = found

    def compiled(self, model: Any, dtype: str) -> Any:
        import sparseworks as sw

        return sw.compile_decoder(model, dtype=dtype)

    def measured(self, model: Any, dtype: str) -> dict[str, Any]:
        from sparseworks.diagnostics.decoding_runtimes import our_candidate

        decoder = self.compiled(model, dtype)
        if getattr(decoder, "report", None) is None:
            raise InvalidArgument(f"{type(model).__name__} has no native decoder: "
                                  f"{'; '.join(decoder.notes)}")  # fmt: skip
        [found, slow] = self._decoded([our_candidate("ours", decoder), self.peer], text=False)
        [quality] = self._decoded([our_candidate("ours", decoder)])
        return {**found, "quality": quality["quality"],
                "speedup": slow["latency_ms"] / found["latency_ms"]}  # fmt: skip

    def _decoded(self, candidates: Any, text: bool = True) -> list[dict[str, Any]]:
        from sparseworks.diagnostics.decoding import measure_decoding

        rows = measure_decoding(
            candidates, self.loaded.model.config.vocab_size, prompts=(64,), repeat=_TURNS,
            text=self.text if text else None,
        )  # fmt: skip
        return [
            {"quality": r["perplexity"] if r.get("perplexity") else math.nan, "bytes": r["bytes"],
             "latency_ms": 1e3 / r["decode_tokens_per_second"]}
            for r in rows
        ]  # fmt: skip


def trial_of(options: Any) -> Trial:
    """Of the model of the options, as it is called: token by token, or as a whole."""
    from sparseworks.cli.loading import load_model

    loaded = load_model(options.model)
    if loaded.kind == "causal":
        return DecodingTrial(options, loaded)
    return CallTrial(options, loaded)
