"""Text from a causal language model, decoded by the native decoder."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks generate`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """Hugging Face folder or hub name, file.py:factory, or a decoder that `compile` wrote."""
    weights: Path | None = None
    """A checkpoint that `sparseworks prune` wrote, loaded into the model."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, where the model has none."""
    prompt: str | None = None
    """What the text begins with."""
    chat: bool = False
    """Talk: a line of standard input at a time, by the tokenizer's chat template."""
    dtype: str = "int8"
    """Of the kept weights: fp32, bf16, int8 or int4."""
    head: str | None = None
    """Of the output head; as dtype where not given."""
    cache: str = "fp16"
    """Of keys and values: fp32, fp16 or int8."""
    max_new_tokens: int = 128
    """At most so many."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that have so much of the probability together."""
    top_k: int = 50
    """Only the so many likeliest tokens; 0: all."""
    seed: int = 0
    """Of sampling."""
    threads: int | None = None
    """Of the native code; as many as torch uses where not given."""
    json: bool = False
    """Print the result as JSON; nothing is streamed."""


def run(options: Options) -> dict[str, Any]:
    """Compile or load, then generate."""
    import torch

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks generate ./llama --chat")
    if (options.prompt is None) == (not options.chat):
        raise InvalidArgument("give either --prompt or --chat")
    if options.chat and options.json:
        raise InvalidArgument("--json prints one result; leave --chat out")
    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise InvalidArgument("--max-new-tokens is at least 1, --temperature at least 0, "
                              "--top-p between 0 and 1")  # fmt: skip
    from sparseworks.cli.decoders import decoder_of, notes_of

    start = time.perf_counter()
    decoder, tokenizer = decoder_of(
        options.model, weights=options.weights, tokenizer=options.tokenizer, dtype=options.dtype,
        head=options.head, cache=options.cache, threads=options.threads,
    )  # fmt: skip
    ready = time.perf_counter() - start
    torch.manual_seed(options.seed)
    if options.chat:
        return _talk(decoder, tokenizer, options)
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise InvalidArgument("--prompt has no tokens")
    start = time.perf_counter()
    found = _generate(decoder, tokenizer, ids, options)
    seconds = time.perf_counter() - start
    new = found.shape[1] - ids.shape[1]
    text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    result = {"model": options.model, "dtype": options.dtype, "prompt": options.prompt,
              "text": text, "tokens": new, "tokens_per_second": new / seconds,
              "seconds_to_load": ready, "notes": notes_of(decoder)}  # fmt: skip
    if options.json:
        import json

        print(json.dumps(result, indent=1))
    else:
        print(f"[{new} tokens, {new / seconds:.1f} a second with the prompt]", file=sys.stderr)
    return result


def _generate(decoder: Any, tokenizer: Any, ids: Any, options: Options) -> Any:
    from transformers import TextStreamer

    chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        chosen = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p,
                  "top_k": options.top_k}  # fmt: skip
    streamer = None
    if not options.json:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.pad_token_id
    return decoder.generate(
        ids, max_new_tokens=options.max_new_tokens, streamer=streamer,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad, **chosen,
    )  # fmt: skip


def _talk(decoder: Any, tokenizer: Any, options: Options) -> dict[str, Any]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidArgument("the tokenizer has no chat template; use --prompt")
    said: list[dict[str, str]] = []
    while True:
        print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return {"turns": said}
        if not line.strip():
            continue
        said.append({"role": "user", "content": line.strip()})
        made = tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found = _generate(decoder, tokenizer, made["input_ids"], options)
        answer = found[0, made["input_ids"].shape[1] :]
        said.append({
            "role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)
        })  # fmt: skip
