"""`sparseworks prune --stream`: the checkpoint goes from folder to folder, a block at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sparseworks.core.errors import InvalidArgument

__all__ = ["prune_streamed"]


def prune_streamed(options: Any, extra: dict[str, Any], group: Any, command: str) -> dict[str, Any]:
    """Prune without ever holding the model; returns what result.json says."""
    import sparseworks as sw
    from sparseworks.cli.loading import parse_dtype
    from sparseworks.cli.preparing import calibration, check_inputs
    from sparseworks.cli.running import plain_options, progress_bar, write_json
    from sparseworks.diagnostics.claims import machine
    from sparseworks.models.ranks import Ranks

    check(options)
    check_inputs(options)
    described = describe(Path(options.model))
    out: Path = options.out
    ranks = Ranks(group)
    ranks.wait()  # all have seen that the folder is not there
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    ranks.wait()
    quiet = options.json or ranks.rank > 0

    def announce(footprint: Any) -> None:
        if not quiet:
            print(f"memory: {footprint}", file=sys.stderr)

    try:
        with progress_bar("pruning", quiet=quiet) as progress:
            result = sw.prune_folder(
                options.model,
                out / "checkpoint",
                options.method,
                sparsity=options.sparsity,
                pattern=options.pattern,
                budget=options.budget,
                data=calibration(described, options),
                include=options.include or None,
                exclude=options.exclude or None,
                skip_indivisible=options.skip_indivisible,
                recovery=options.recovery,
                seed=options.seed,
                dtype=parse_dtype(options.dtype),
                device=options.device,
                layout=options.layout,
                shard_size=options.shard_size,
                spill=options.spill,
                resume=options.resume,
                group=group,
                announce=announce,
                progress=progress,
                **extra,
            )
    except BaseException:
        if ranks.rank == 0 and not any(out.iterdir()):
            out.rmdir()
        raise
    checkpoint = out / "checkpoint"
    weights = list(checkpoint.glob("*.safetensors"))
    summary = {
        "command": command,
        "options": plain_options(options),
        "model": options.model,
        "class": described.kind,
        "dense_bytes": sum(f.stat().st_size for f in Path(options.model).glob("*.safetensors")),
        "file_bytes": sum(f.stat().st_size for f in weights),
        "checkpoint": str(checkpoint),
        "ranks": ranks.size,
        "metrics": [],
        "result": result.to_dict(),
        "machine": machine(),
    }
    if ranks.rank == 0:
        write_json(out / "result.json", summary)
        write_json(out / "options.json", plain_options(options))
    return summary


def check(options: Any) -> None:
    """Refuse what does not go with --stream."""
    if options.out is None:
        raise InvalidArgument("--stream writes as it goes: give --out")
    if not Path(options.model).is_dir():
        raise InvalidArgument(
            f"{options.model}: --stream reads a folder of config.json and safetensors here"
        )
    wrong = {
        "--metric": options.metric,
        "--eval-data": options.eval_data,
        "--rounds": options.rounds,
        "--no-signed-zeros": not options.signed_zeros,
    }
    if given := [flag for flag, value in wrong.items() if value]:
        raise InvalidArgument(
            f"{given[0]} takes the model as a whole, which --stream never has; measure the folder "
            "that it writes"
        )
    if options.force:
        raise InvalidArgument(f"--stream replaces nothing: delete {options.out}, leave --force out")
    if options.resume and not (options.out / "checkpoint.part").is_dir():
        raise InvalidArgument(f"{options.out}: nothing was interrupted there; leave --resume out")


def describe(folder: Path) -> Any:
    """Kind and tokenizer of a model, without its weights."""
    import transformers

    from sparseworks.cli.loading import LoadedModel, kind_of_class
    from sparseworks.io.plain import read_json

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    names = read_json(folder / "config.json").get("architectures") or [""]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:  # there may be none; what needs one says so
        tokenizer = None
    return LoadedModel(None, kind_of_class(names[0]), tokenizer, str(folder))
