"""Causal language models by name with their tokenizer: as they are, or as compiled decoders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparseworks.core.errors import InvalidArgument

__all__ = ["causal_model", "decoder_of", "is_decoder", "notes_of"]


def is_decoder(name: str) -> bool:
    """Whether a name is a file that `sparseworks compile` may have written for a language model."""
    return Path(name).suffix == ".safetensors"


def causal_model(
    name: str, *, weights: Path | None, tokenizer: str | None, dtype: str | None = None
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        name: as `load_model` takes it.
        weights: a checkpoint that is loaded into it.
        tokenizer: folder or hub name, where the model has none.
        dtype: fp32 where not given.

    Raises:
        InvalidArgument: another kind of model, or no tokenizer.
    """
    import sparseworks as sw
    from sparseworks.cli.loading import load_model

    loaded = load_model(name, dtype)
    if loaded.kind != "causal":
        raise InvalidArgument(f"{name} is not a causal language model")
    found = loaded.tokenizer if tokenizer is None else _tokenizer(tokenizer)
    if found is None:
        raise InvalidArgument(f"{name} has no tokenizer; give --tokenizer FOLDER")
    if weights is not None:
        sw.load(weights, loaded.model)
    return loaded.model, found


def decoder_of(
    name: str,
    *,
    weights: Path | None,
    tokenizer: str | None,
    dtype: str,
    head: str | None = None,
    cache: str = "fp16",
    threads: int | None = None,
) -> tuple[Any, Any]:
    """A compiled decoder and its tokenizer: of a file, or made of a model.

    Raises:
        InvalidArgument: as `causal_model`; weights for a file, which has its own.
    """
    import sparseworks as sw

    if is_decoder(name):
        if weights is not None:
            raise InvalidArgument("--weights go into a model; a compiled decoder has its own")
        decoder = sw.load_decoder(name, threads=threads, cache=cache)
        named = tokenizer or decoder.tokenizer_name
        if not named:
            raise InvalidArgument(f"{name} names no tokenizer; give --tokenizer FOLDER")
        return decoder, _tokenizer(named)
    model, found = causal_model(name, weights=weights, tokenizer=tokenizer)
    decoder = sw.compile_decoder(model, dtype=dtype, head=head, cache=cache, threads=threads)
    for note in notes_of(decoder):
        print(f"[{note}]", file=sys.stderr)
    return decoder, found


def notes_of(decoder: Any) -> list[str]:
    """Why a model runs layer by layer, where it does."""
    return list(getattr(decoder, "notes", []))


def _tokenizer(name: str) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"--tokenizer {name}: {str(error).splitlines()[0]}") from None
