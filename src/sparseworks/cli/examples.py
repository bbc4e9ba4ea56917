"""Example batches of a size that the user names, for timing and counting."""

from __future__ import annotations

from typing import Any

import torch

from sparseworks.core.errors import InvalidArgument

__all__ = ["example_of", "random_example"]


def example_of(loaded: Any, options: Any) -> Any:
    """A batch of `options.batch` samples: a random one, or the first of the data that is named;
    None where neither tells what the model takes.

    Raises:
        InvalidArgument: a shape that is not one.
        DataError: the data cannot be read.
    """
    from sparseworks.cli.preparing import own_batches
    from sparseworks.data import load
    from sparseworks.models.calls import Arguments

    known = loaded.tokenizer is not None or loaded.input_shape
    if options.input_shape or known:
        return random_example(
            loaded, options.batch, tokens=options.tokens, input_shape=options.input_shape
        )
    source = options.data or options.eval_data
    if source is None:
        return None
    if ".py:" in source:
        return Arguments.of_batch(own_batches(source)[0])
    batches = load(source, split="evaluation", samples=options.batch, batch_size=options.batch)
    return Arguments.of_batch(batches[0])


def random_example(
    loaded: Any, batch: int, *, tokens: int = 128, input_shape: tuple[int, ...] = (), seed: int = 0
) -> Any:
    """A random batch that a loaded model takes.

    Args:
        loaded: from `load_model`.
        batch: samples.
        tokens: of each text.
        input_shape: of one sample, for models that do not tell.

    Raises:
        InvalidArgument: sizes below 1, or a model whose input is not known.
    """
    if min((batch, tokens, *input_shape)) < 1:
        raise InvalidArgument(f"batch={batch}, tokens={tokens}, input shape {list(input_shape)}: "
                              "all must be at least 1")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    if input_shape:
        return torch.randn(batch, *input_shape, generator=generator)
    if loaded.tokenizer is not None:
        words = loaded.model.config.vocab_size
        ids = torch.randint(0, words, (batch, tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if loaded.input_shape:
        return torch.randn(batch, *loaded.input_shape, generator=generator)
    raise InvalidArgument("give --input-shape, the shape of one sample (for example 3 224 224)")
