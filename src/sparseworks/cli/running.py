"""What all commands share: options from flags or a config file, errors in one line, progress."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sparseworks.core.errors import SparseworksError

__all__ = ["progress_bar", "run_command", "write_csv", "write_json"]


def run_command(name: str, module: ModuleType, arguments: Sequence[str]) -> int:
    """Parse the options of a command, run it, and turn errors into one line and a code."""
    import tyro

    from sparseworks.cli.config import take_config
    from sparseworks.cli.plugins import load_plugins
    from sparseworks.cli.usage import footer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        default, rest = take_config(module.Options, arguments, f"sparseworks {name}")
        kwargs: dict[str, Any] = {} if default is None else {"default": default}
        options = tyro.cli(
            module.Options,
            args=rest,
            prog=f"sparseworks {name}",
            description=(module.__doc__ or "").strip(),
            **kwargs,
        )
        load_plugins(options)
        module.run(options)
    except SparseworksError as error:
        print(f"sparseworks: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sparseworks: interrupted; nothing was written", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if stop.code in (0, None) and {"-h", "--help"} & set(arguments):
            print(footer(name))
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"sparseworks: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        if not _failed_in_a_plugin(error):
            raise
        return 1
    return 0


def _failed_in_a_plugin(error: Exception) -> bool:
    """Say which line of a user's method failed, under the traceback; False: it was no such line."""
    import traceback

    from sparseworks.core.places import said
    from sparseworks.core.plugins import place_in_plugin

    place = place_in_plugin(error)
    if place:
        traceback.print_exception(error)
        print(f"sparseworks: error: plugin {place}: {said(error)}", file=sys.stderr)
    return bool(place)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    from sparseworks.io.atomic import atomic_file

    with atomic_file(path) as file:
        file.write_text(json.dumps(value, indent=1, default=str) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], otherwise: Sequence[str] = ()) -> None:
    """Write rows, whole or not at all; without rows the head alone, of the names `otherwise`."""
    from sparseworks.io.atomic import atomic_file

    names = list(dict.fromkeys(key for row in rows for key in row)) or list(otherwise)
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def plain_options(options: Any) -> dict[str, Any]:
    """An options object as JSON values, as `--config` takes them."""
    values = dataclasses.asdict(options)
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


@contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Any]:
    """A `(done, total, what)` callback that draws a bar with the time left, on standard error.

    Nothing is drawn in the first two seconds, nor where standard error is not a terminal (there a
    line every ten seconds says how far it is).
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    began = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    state: dict[str, Any] = {"task": None, "said": began}

    def report(done: int, total: int, item: str) -> None:
        now = time.monotonic()
        if quiet or now - began < 2:
            return
        if not console.is_terminal:
            if now - state["said"] >= 10:
                state["said"] = now
                left = (now - began) / max(1, done) * (total - done)
                print(f"{what}: {done}/{total}, about {left:.0f} s left", file=sys.stderr)
            return
        if state["task"] is None:
            bar.start()
            state["task"] = bar.add_task(what, total=total)
        bar.update(state["task"], completed=done, total=total, description=f"{what} {item}"[:60])

    try:
        yield report
    finally:
        if state["task"] is not None:
            bar.stop()
