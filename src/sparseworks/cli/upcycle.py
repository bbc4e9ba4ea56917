"""Turn the MLPs of a dense model into mixtures of experts, train them on where asked, and save.

The output folder holds the model (`checkpoint`: a Mixtral or Qwen3-MoE that transformers loads; for
routing that no class there has, `mixture.safetensors`, which `sw.load` reads into a model upcycled
in the same way) and result.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.cli.fields import EvalData, MethodOptions
from sparseworks.cli.plugins import Plugins
from sparseworks.core.errors import InvalidArgument, ModelError

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks upcycle`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """Hugging Face folder or hub name, file.py:factory."""
    method: str = "upcycling"
    """Registered method of kind mixture; `sparseworks methods` describes them."""
    plugin: Plugins = ()
    experts: int | None = None
    """Experts of every layer; default: the method's."""
    top_k: int | None = None
    """Experts of a token, of methods with a fixed number."""
    include: tuple[str, ...] = ()
    """Name patterns of the only MLPs to turn."""
    exclude: tuple[str, ...] = ()
    """Name patterns of MLPs to leave dense."""
    option: MethodOptions = ()
    data: str | None = None
    """Text or file.py:batches to train on after it."""
    steps: int = 0
    """Optimizer steps of that training; 0: none."""
    lr: float = 1e-4
    """Of AdamW."""
    length: int = 256
    """Tokens of a window."""
    batch_size: int = 8
    """Windows of a step."""
    metric: tuple[str, ...] = ()
    """perplexity, file.py:function; default: what fits the model."""
    eval_data: EvalData = None
    eval_samples: int | None = None
    """Evaluation windows; default: 64."""
    seed: int = 0
    """Of routers, noise and training windows."""
    dtype: str | None = None
    """fp32, bf16 or fp16; default fp32."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force."""
    force: bool = False
    """Replace the output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Measure, turn, train, measure, save."""
    import sparseworks as sw
    from sparseworks.cli.loading import default_metrics, load_model
    from sparseworks.cli.preparing import check_inputs, check_output, make_metrics
    from sparseworks.cli.running import progress_bar
    from sparseworks.cli.values import parse_options
    from sparseworks.core import registry

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks upcycle ./llama --out moe")
    if options.steps < 0 or (options.steps and options.data is None):
        raise InvalidArgument(f"--steps {options.steps}: from 0, and with --data to train on")
    check_output(options.out, options.force)
    check_inputs(options)
    given = {k: v for k in ("experts", "top_k") if (v := getattr(options, k)) is not None}
    settings = given | parse_options(options.option)
    registry.build(options.method, ("mixture",), **settings)
    loaded = load_model(options.model, options.dtype)
    data = _batches(loaded, options) if options.steps else []
    names = options.metric or default_metrics(loaded, options.eval_data)
    metrics = make_metrics(names, loaded, options.eval_data, options.eval_samples)
    before = {m.name: m(loaded.model) for m in metrics}
    parameters = [sum(p.numel() for p in loaded.model.parameters())]
    made = sw.upcycle(
        loaded.model, options.method, steps=options.steps or None, seed=options.seed,
        include=options.include or None, exclude=options.exclude or None, **settings,
    )  # fmt: skip
    parameters.append(sum(p.numel() for p in loaded.model.parameters()))
    start = {m.name: m(loaded.model) for m in metrics}
    if options.steps:
        with progress_bar("training", quiet=options.json) as progress:
            _train(made, data, options, progress)
    made.finish()
    made.reset()
    after = {m.name: m(loaded.model.eval()) for m in metrics} if options.steps else start
    result = {
        "model": loaded.name,
        "method": made.method,
        "options": made.options,
        "parameters": parameters,
        "layers": {n: x.experts.extra_repr() for n, x in made.layers.items()},
        "metrics": {m.name: {"before": before[m.name], "upcycled": start[m.name],
                             "after": after[m.name]} for m in metrics},
        "load": {n: {"active": x.active, "imbalance": x.imbalance}
                 for n, x in made.load().items() if x.tokens},
    }  # fmt: skip
    if options.out is not None:
        _write(options, loaded, made, result)
    if options.json:
        print(json.dumps(result, indent=1))
        return result
    print(made)
    print(f"parameters: {parameters[0]:,} before, {parameters[1]:,} after")
    for name, values in result["metrics"].items():
        print(f"{name}: " + ", ".join(f"{v:.4g} {k}" for k, v in values.items()))
    if options.out is not None:
        print(f"wrote {options.out / result['checkpoint']}")
    return result


def _batches(loaded: Any, options: Options) -> list[Any]:
    from sparseworks.cli.preparing import own_batches
    from sparseworks.data import load

    assert options.data is not None
    if ".py:" in options.data:
        return own_batches(options.data)
    return load(
        options.data, tokenizer=loaded.tokenizer, kind="windows", length=options.length,
        samples=options.steps * options.batch_size, batch_size=options.batch_size,
        seed=options.seed,
    )  # fmt: skip


def _train(made: Any, data: list[Any], options: Options, progress: Any) -> None:
    import torch

    from sparseworks.models.calls import default_loss

    torch.manual_seed(options.seed)
    model = made.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr)
    made.attach(optimizer)
    for step in range(options.steps):
        optimizer.zero_grad()
        loss = default_loss(model, data[step % len(data)]) + made.penalty()
        if not bool(torch.isfinite(loss)):
            raise ModelError(f"step {step}: the loss is not finite; lower --lr")
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, options.steps, f"loss {loss.item():.3f}")
    model.eval()


def _write(options: Options, loaded: Any, made: Any, result: dict[str, Any]) -> None:
    """The whole folder, or nothing."""
    import sparseworks as sw
    from sparseworks.cli.running import plain_options, write_json
    from sparseworks.io.atomic import replaced_folder

    assert options.out is not None
    with replaced_folder(options.out) as folder:
        try:
            model = made.to_transformers()
        except ModelError as error:
            result |= {"checkpoint": "mixture.safetensors", "why": str(error)}
            sw.save(loaded.model, folder / "mixture.safetensors")
        else:
            result["checkpoint"] = "checkpoint"
            model.save_pretrained(folder / "checkpoint")
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(folder / "checkpoint")
        write_json(folder / "result.json", result)
        write_json(folder / "options.json", plain_options(options))
