"""The command line: `sparseworks COMMAND`.

Exit codes: 0 done, 1 an error that is said in one line, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "prune": "make a trained model sparse, save it, and report what it cost",
    "train": "train a classifier or a language model sparse, with checkpoints",
    "finetune": "fine-tune a Hugging Face model sparse, by transformers' Trainer",
    "slim": "cut channels and heads: a smaller dense model for any runtime",
    "tickets": "train a classifier several times: lottery tickets and sparse soups",
    "quantize": "weights as integers in groups, alone or with pruned groups",
    "activations": "inputs and neurons of a token that may count as 0, by thresholds",
    "upcycle": "the MLPs of a dense model become mixtures of experts",
    "compile": "make a sparse model skip its zeros on CPUs, and say what runs",
    "generate": "text from a language model, by the native decoder",
    "export": "write a model as other runtimes read it: integers, GGUF, dense",
    "bench": "time a model beside torch, onnxruntime and openvino",
    "evaluate": "score a language model on tasks of lm-evaluation-harness",
    "inspect": "sparsity, size and FLOPs per tensor of a model or checkpoint",
    "recipe": "the best model under your goals, found within a time: slim, prune, bits, all",
    "compare": "what methods trade on one model: quality, size, FLOPs, time; table, CSV, page",
    "curve": "how much one-shot pruning removes for free: the metric over the sparsity",
    "audit": "is a comparison of recorded runs fair: cost, schedule, seeds, layers, speed",
    "methods": "the catalogue of methods",
    "new-method": "a method of your own to start from: a file that runs, and its test",
    "claims": "run, list and tabulate the papers' claims in miniature",
    "doctor": "is this installation sound: processor, native code, torch, packages",
    "demo": "prune a real sentence encoder and show the result",
    "completion": "commands, options and methods behind the Tab key: bash, zsh, fish",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from sparseworks.version import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; use one of {', '.join(COMMANDS)}"
        print(f"sparseworks: error: unknown command {name!r}{hint}", file=sys.stderr)
        return 2
    if name == "doctor" and importlib.util.find_spec("tyro") is None:
        from sparseworks.cli.doctor import without_parser

        return without_parser(rest)
    from sparseworks.cli.running import run_command

    return run_command(
        name, importlib.import_module(f"sparseworks.cli.{name.replace('-', '_')}"), rest
    )


def _usage() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "sparseworks: make a model sparse, prove what it cost, skip the rest\n\n"
        f"usage: sparseworks COMMAND [options]\n\n{listed}\n\n"
        "`sparseworks COMMAND --help` shows the options of a command."
    )
