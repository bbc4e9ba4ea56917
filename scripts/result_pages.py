"""Pages of the documentation that show results of `benchmarks/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["families_page", "reliability_page"]

Row = Mapping[str, Any]
STEPS = ("magnitude", "wanda", "file", "folder", "slim", "compile")

FAMILIES = """# Model families

One small model of random weights of each of {families} families, built from the configurations of
transformers {transformers} and timm {timm}, goes through every step (`make families`; figures in
`benchmarks/results/families.json`):

- *magnitude*, *wanda*: half of the weights become zero, the kept ones stay as they are.
- *file*, *folder*: saved and read back, every bit, the masks and the outputs the same. A folder is
  one of transformers.
- *slim*: 30 % of the operations go; the cut model computes what the whole one does with the cut
  groups at zero, on the example and on other inputs, and is saved and read back.
- *compile*: the sparse model compiled; the same outputs on the example and on other inputs. The
  entry is what was fastest at this size: a program, single layers, or torch.

*refused* is an error of ours that says why; *failed* is anything else. Both are listed below the
table.

"""

RELIABILITY = """# Reliability

What damaged files, killed processes and random cases come to (`make reliability`; figures and
machine in `benchmarks/results/reliability.json`, seed {seed}). Of {trials:,} trials {wrong} came
out as none must; exports for other tools are counted apart.

"""
DAMAGE = """
## Damaged files

One change to a file that was written: a bit, a byte, two pieces that change places, a piece of
zeros, a truncation, bytes at the end. Reading it must give an error of ours that says what is
wrong, or exactly what was written. *Warned* is for `config.json` and `generation_config.json`,
which people edit: a value that is not as it was saved is told, and used. The last three must not
be.

"""
EXPORTS = """
Formats for other tools have no place for a hash, so a changed byte of a weight is a changed weight
there: keep the packed file beside an export.

"""
WRITES = """
## Killed writes

A new version takes the place of an old one, and the process is killed (SIGKILL): at a random time,
at a random call of sparseworks, or at a random call of the code that puts files in their place. The
old version or the new one must be there, whole. *Left over* are half-written files that the next
write does not remove.

"""
COMMANDS = """
## Killed commands

Killed at random times and resumed, again and again, until they end; then their files must be those
of the command that nobody killed, byte for byte.

"""
FUZZ = """
## Random cases

Random shapes, patterns, dtypes and instruction sets ({sets}): packing is exact, products are those
of the dense matrix in fp64 within rounding, patterns are what a sort chooses, and any bits of any
dtype come back from a file.

"""


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def families_page(result: Mapping[str, Any]) -> str:
    """The table of `make families`."""
    page = FAMILIES.format(families=result["families"], **_versions(result))
    total = [[step, *(result["summary"][step].get(s, 0) for s in _STATES)] for step in STEPS]
    page += table(["step", *_STATES], total)
    kinds = list(dict.fromkeys(row["kind"] for row in result["rows"]))
    for kind in kinds:
        rows = [row for row in result["rows"] if row["kind"] == kind]
        page += f"\n## {kind[0].upper() + kind[1:]}\n\n"
        page += table(
            ["family", *STEPS], ([r["family"], *(_cell(r, s) for s in STEPS)] for r in rows)
        )
    notes = [
        f"- {row['family']}, {step}: {row[step]['status']}: {_plain(row[step]['message'])}\n"
        for row in result["rows"] for step in STEPS if row[step].get("message")
    ]  # fmt: skip
    alone = [
        f"- {row['family']}: {_plain(row['slim']['uniform'])}\n"
        for row in result["rows"] if row["slim"].get("uniform")
    ]  # fmt: skip
    outside = [
        f"- {row['family']}: {_plain(row['compile']['no program'])}\n"
        for row in result["rows"] if row["compile"].get("no program")
    ]  # fmt: skip
    for head, lines in (
        ("Refused and failed", notes),
        ("Slimmed with widths per layer, and why not with equal ones", alone),
        ("Not compiled as a program, and why", outside),
    ):
        page += f"\n## {head}\n\n{''.join(lines)}" if lines else ""
    return page


_STATES = ("ok", "refused", "failed", "not reached", "does not apply")


def _versions(result: Mapping[str, Any]) -> dict[str, str]:
    return {name: result["machine"][name] for name in ("transformers", "timm")}


def _cell(row: Row, step: str) -> str:
    found = row[step]
    if found["status"] != "ok":
        return "-" if found["status"] == "does not apply" else str(found["status"])
    if step == "slim":
        return f"{found['operations']:.0%}"
    return str(found["kind"]) if step == "compile" else "ok"


def _plain(text: str) -> str:
    """A message on one line, without what Markdown or a path of a machine would make of it."""
    words = " ".join(text.split()).replace("|", "/").replace("<", "‹").replace(">", "›")
    return " ".join(w.rpartition("site-packages/")[2] or w for w in words.split(" "))


def reliability_page(result: Mapping[str, Any]) -> str:
    """The tables of `make reliability`."""
    trials = (
        sum(r["trials"] for r in result["damage"]) + sum(r["writes"] for r in result["writes"])
        + sum(r["kills"] for r in result["commands"]) + sum(r["cases"] for r in result["fuzz"])
    )  # fmt: skip
    wrong = result["must not be"] or "none"
    page = RELIABILITY.format(seed=result["seed"], trials=trials, wrong=wrong)
    sets = ", ".join(result["instruction sets"]) or "no native kernels"
    return (
        page.rstrip("\n") + "\n"
        + DAMAGE + _counts(result["damage"]) + EXPORTS + _counts(result["damage of exports"])
        + WRITES + _counts(result["writes"])
        + COMMANDS + _counts(result["commands"])
        + FUZZ.format(sets=sets) + _counts(result["fuzz"])
    )  # fmt: skip


def _counts(rows: list[Row]) -> str:
    names = [k for k in rows[0] if k not in ("first that must not be", "seconds undisturbed")]
    return table(names, ([row[n] for n in names] for row in rows))
