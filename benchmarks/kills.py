"""Kill `sparseworks prune --stream` at random moments, go on, and compare with what was not killed.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--work /tmp] [--out FILE.json]

A run is a process that gets SIGKILL at a moment drawn uniformly from 0 to the time that the command
takes when nobody kills it; then `--resume` goes on, is killed again, and so on until a run ends,
after which the next command begins anew, until so many kills were made. Commands take turns: Wanda,
and SparseGPT with `--spill`. The moments come from one generator; where a moment finds the command
depends on the machine too. The figures: files that differ in any byte from those of the command
that was not killed, and blocks of which a weight was pruned again though they were done, by the
journal, before a kill.

Processes are forked from this one, which has its packages loaded: kills hit the work, not imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from forking import forked

COMMANDS = {"wanda": ("wanda", []), "sparsegpt, spilled": ("sparsegpt", ["--spill"])}
BLOCKS = 24
STATES = ("before the journal", "between the first block and the last", "after the last block")


def make(folder: Path) -> None:
    """A Llama of random weights in small shards, and texts of random tokens as FILE.py:texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=BLOCKS,
        num_attention_heads=6, num_key_value_heads=2, dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model", max_shard_size="2MB")
    (folder / "data.py").write_text(
        "import torch\n"
        "def texts():\n"
        "    generator = torch.Generator().manual_seed(1)\n"
        "    ids = [torch.randint(0, 512, (4, 128), generator=generator) for _ in range(8)]\n"
        "    return [{'input_ids': i, 'attention_mask': torch.ones_like(i)} for i in ids]\n"
    )


def words(work: Path, out: Path, name: str, resume: bool) -> list[str]:
    method, more = COMMANDS[name]
    return [
        "prune", str(work / "model"), "--method", method, "--sparsity", "0.5", "--data",
        f"{work / 'data.py'}:texts", "--stream", "--json", "--shard-size", "2MB", *more,
        "--out", str(out), *(["--resume"] if resume else []),
    ]  # fmt: skip


def started(arguments: list[str], log: Path) -> int:
    """The id of a process that runs the command and writes a line for every weight it prunes."""

    def run() -> int:
        from sparseworks.cli import main
        from sparseworks.weights.oneshot.job import Job

        prune_one = Job.prune_one
        lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def logged(self: Job, view: Any, *rest: Any) -> None:
            prune_one(self, view, *rest)
            os.write(lines, f"{view.name}\n".encode())

        Job.prune_one = logged  # type: ignore[method-assign]
        return main(arguments)

    return forked(run)


def ended(process: int, within: float | None = None) -> int | None:
    """The exit status; None where it still runs after so many seconds."""
    end = None if within is None else time.monotonic() + within
    while end is None or time.monotonic() < end:
        found, status = os.waitpid(process, 0 if end is None else os.WNOHANG)
        if found:
            return status
        time.sleep(0.0005)
    return None


def journal(out: Path) -> list[str] | None:
    """Units that are done, by a journal whose last line may be torn; None: there is none."""
    path = out / "checkpoint.part" / "journal.jsonl"
    if not path.is_file():
        return None
    lines = path.read_bytes().rpartition(b"\n")[0].split(b"\n")[1:]
    return [json.loads(line)["unit"] for line in lines]


def hashes(out: Path) -> dict[str, str]:
    files = (p for p in (out / "checkpoint").rglob("*") if p.is_file())
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)
    }


def whole(work: Path, name: str) -> tuple[float, dict[str, str]]:
    """Seconds and files of the command that nobody kills."""
    out, began = work / "whole", time.monotonic()
    status = ended(started(words(work, out, name, False), work / "log"))
    seconds = time.monotonic() - began
    if status != 0:
        raise SystemExit(f"{name}: ends with {status} though nobody kills it")
    found = hashes(out)
    shutil.rmtree(out)
    return seconds, found


def until_done(
    work: Path, name: str, wanted: dict[str, str], seconds: float, draw: random.Random, left: int
) -> dict[str, Any]:
    """One command, killed again and again until a run ends or no kill is left."""
    out, kills, again, repeated = work / "out", [], 0, 0
    while True:
        done = journal(out)
        if done is None:
            shutil.rmtree(out, ignore_errors=True)  # as the command says: nothing was begun
        log = work / "log"
        log.unlink(missing_ok=True)
        process = started(words(work, out, name, done is not None), log)
        moment = draw.random() * seconds if len(kills) < left else None
        status = ended(process, moment)
        if status is None:
            os.kill(process, signal.SIGKILL)
            status = ended(process)
        pruned = log.read_text().split() if log.is_file() else []
        again += sum(any(n.startswith(f"{u}.") for n in pruned) for u in done or ())
        now = journal(out)
        if status == 0:
            break
        if status != signal.SIGKILL:
            raise SystemExit(f"{name}: a run that went on ends with {status}")
        blocks = [u for u in now or () if ".layers." in u]
        repeated += sum(not any(n.startswith(f"{u}.") for u in blocks) for n in pruned)
        kills.append({
            "after_seconds": moment, "blocks_done": len(blocks),
            "state": STATES[0 if now is None else 2 if len(blocks) == BLOCKS else 1],
        })  # fmt: skip
    found = hashes(out)
    shutil.rmtree(out)
    return {
        "command": name, "kills": kills, "files": len(found),
        "files_that_differ": sorted(f for f in found.keys() | wanted.keys()
                                    if found.get(f) != wanted.get(f)),
        "blocks_done_twice": again,
        "weights_pruned_in_vain": repeated,  # of the block that a kill interrupted
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", type=Path)
    options = parser.parse_args()
    if options.make:
        make(options.make)
        return
    work = Path(tempfile.mkdtemp(prefix="kills-", dir=options.work))
    draw, runs, left = random.Random(options.seed), [], options.kills
    try:
        subprocess.run([sys.executable, __file__, "--make", str(work)], check=True)
        import transformers.models.llama.modeling_llama  # noqa: F401

        import sparseworks.weights.oneshot.from_disk  # noqa: F401
        from sparseworks.diagnostics.machines import machine

        undisturbed = {name: whole(work, name) for name in COMMANDS}
        while left > 0:
            name = list(COMMANDS)[len(runs) % len(COMMANDS)]
            seconds, wanted = undisturbed[name]
            runs.append(until_done(work, name, wanted, seconds, draw, left))
            left -= len(runs[-1]["kills"])
            print(json.dumps(runs[-1]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    states = [k["state"] for r in runs for k in r["kills"]]
    result = {
        "seed": options.seed, "blocks": BLOCKS, "machine": machine(),
        "seconds_undisturbed": {n: s for n, (s, _) in undisturbed.items()},
        "kills": len(states), "states": {s: states.count(s) for s in STATES},
        "bit_identical": not any(r["files_that_differ"] for r in runs),
        "blocks_done_twice": sum(r["blocks_done_twice"] for r in runs),
        "commands": runs,
    }  # fmt: skip
    print(json.dumps({k: v for k, v in result.items() if k != "commands"}))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
