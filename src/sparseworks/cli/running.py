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

from sparseworks.core.errors import InvalidArgument, SparseworksError

__all__ = ["progress_bar", "run_command", "write_csv", "write_json"]


def run_command(name: str, module: ModuleType, arguments: Sequence[str]) -> int:
    """Parse the options of a command, run it, and turn errors into one line and a code."""
    import tyro

    from sparseworks.cli.plugins import load_plugins

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        default, rest = _config(module.Options, list(arguments))
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


def _config(options: type, arguments: list[str]) -> tuple[Any, list[str]]:
    """Take `--config FILE` out of the arguments; its values become the defaults."""
    for i, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.partition("=")[2]
            if not inline and i + 1 >= len(arguments):
                raise InvalidArgument("--config needs the name of a JSON file")
            path = Path(inline or arguments[i + 1])
            rest = arguments[:i] + arguments[i + (1 if inline else 2) :]
            return _read_config(options, path), rest
    return None, arguments


def _read_config(options: type, path: Path) -> Any:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{path}: not JSON ({error})") from None
    known = {f.name: f for f in dataclasses.fields(options)}
    if not isinstance(values, dict) or set(values) - set(known):
        odd = sorted(set(values) - set(known)) if isinstance(values, dict) else type(values)
        raise InvalidArgument(f"{path}: unknown options {odd}; `--help` lists those there are")
    made = {
        k: tuple(v) if isinstance(v, list) else Path(v) if k == "out" and v else v
        for k, v in values.items()
    }
    return options(**made)


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
