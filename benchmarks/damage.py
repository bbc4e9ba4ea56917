"""Files damaged at random, and what reading them comes to.

Each trial changes one file: a bit, a byte, two pieces that change places, a piece of zeros, a
truncation, bytes at its end. Reading gives a *named error* (of ours, with a message), the *exact*
value that was written, *warned* (another value, and a warning that says so), or what must not be:
*silently wrong*, an *unnamed error* (any other exception), a *crash* (the process died, or was
killed after 20 seconds). Trials run in processes of their own, forked from one that has everything
loaded.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from forking import forked
from sparseworks.core.errors import SparseworksError
from written import Format, files

__all__ = ["BAD", "OUTCOMES", "campaign", "damaged"]

OUTCOMES = ("named error", "exact", "warned", "silently wrong", "unnamed error", "crash")
BAD = OUTCOMES[3:]
SECONDS = 20  # of one trial
HEADER = 4096  # every second trial is within so many first bytes, where headers are


def damaged(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Changed bytes, and how they were changed."""
    bad, size = bytearray(data), len(data)

    def place() -> int:
        return draw.randrange(min(size, HEADER) if draw.random() < 0.5 else size)

    kind = draw.choice(("bit", "byte", "swap", "zeros", "truncated", "appended"))
    if kind == "bit":
        bad[place()] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        bad[place()] = draw.randrange(256)
    elif kind == "swap":
        width = draw.randint(1, min(64, size // 2))
        a, b = (min(place(), size - width) for _ in range(2))
        if abs(a - b) >= width:
            bad[a : a + width], bad[b : b + width] = bad[b : b + width], bad[a : a + width]
    elif kind == "zeros":
        start = place()
        end = min(size, start + draw.randint(1, 512))
        bad[start:end] = bytes(end - start)
    elif kind == "truncated":
        del bad[place() :]
    else:
        bad += draw.randbytes(draw.randint(1, 64))
    return bytes(bad), kind


def outcome(read: Callable[[], Any], wanted: Any) -> tuple[str, str]:
    """How reading ends, and the message."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = read()
        except SparseworksError as error:
            return "named error", str(error)
        except Exception as error:
            said = [w for w in told if "not as it was saved" in str(w.message)]
            return "warned" if said else "unnamed error", f"{type(error).__name__}: {error}"
        if found == wanted:
            return "exact", ""
        said = [w for w in told if "not as it was saved" in str(w.message)]
        return ("warned", "") if said else ("silently wrong", "")


def trials(format: Format, path: Path, numbers: range, seed: str) -> Iterator[dict[str, Any]]:
    """Damage, read, mend; one line for each trial that changed something."""
    wanted, chosen = format.read(path), files(path)
    for number in numbers:
        signal.alarm(SECONDS)
        draw = random.Random(f"{seed} {number}")
        file = draw.choice(chosen)
        good = file.read_bytes()
        bad, kind = damaged(good, draw)
        if bad == good:
            yield {"trial": number, "outcome": "unchanged"}
            continue
        file.write_bytes(bad)
        found, message = outcome(lambda: format.read(path), wanted)
        file.write_bytes(good)
        yield {"trial": number, "outcome": found, "damage": kind, "file": file.name,
               "message": message[:300]}  # fmt: skip
    signal.alarm(0)


def in_a_process(work: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Lines of a forked process, until it ends or dies."""
    reading, writing = os.pipe()

    def tell() -> None:
        os.close(reading)
        with os.fdopen(writing, "w") as lines:
            for line in work():
                lines.write(json.dumps(line) + "\n")
                lines.flush()

    child = forked(tell)
    os.close(writing)
    with os.fdopen(reading) as lines:
        for line in lines:
            yield json.loads(line)
    os.waitpid(child, 0)


def campaign(name: str, format: Format, count: int, seed: int) -> dict[str, Any]:
    """Counts of the outcomes, and the first of those that must not be."""
    counts: Counter[str] = Counter()
    bad: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        path = Path(folder) / format.name
        format.write(path, 0)
        good = {f: f.read_bytes() for f in files(path)}
        first = 0
        while first < count:
            work = partial(trials, format, path, range(first, count), f"{seed} {name}")
            for line in in_a_process(work):
                first = line["trial"] + 1
                counts[line["outcome"]] += 1
                if line["outcome"] in BAD:
                    bad.append(line)
            if first < count:  # it died in this trial
                counts["crash"] += 1
                bad.append({"trial": first, "outcome": "crash"})
                first += 1
                for file, data in good.items():
                    file.write_bytes(data)
    found = {outcome: counts[outcome] for outcome in OUTCOMES}
    return {
        "format": name,
        "trials": sum(found.values()),
        **found,
        "first that must not be": bad[:5],
    }
