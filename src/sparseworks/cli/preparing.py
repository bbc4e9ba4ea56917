"""What pruning commands share: output folders, method options, calibration data, metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparseworks.cli.fields import BatchSize, Length, Samples
from sparseworks.cli.plugins import Plugins
from sparseworks.core.errors import InvalidArgument

__all__ = [
    "CalibrationOptions",
    "Measured",
    "calibration",
    "check_inputs",
    "check_output",
    "make_metrics",
    "one_metric",
    "own_batches",
    "prompts_of",
]


def check_output(out: Path | None, force: bool) -> None:
    """Refuse an output that would overwrite something, or that cannot be made where it is to be."""
    from sparseworks.io.atomic import check_place

    if out is None:
        return
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgument(f"{out}: already exists; choose another --out, or --force")
    check_place(out)


def check_inputs(options: Any) -> None:
    """Refuse data, weights and metrics that are not there, before a model is loaded and run."""
    from sparseworks.data.loading import check_source
    from sparseworks.data.paths import existing
    from sparseworks.diagnostics.metrics import check_name

    for field, check in (
        ("data", check_source),
        ("eval_data", check_source),
        ("start", existing),
        ("weights", existing),
        ("activations", existing),
    ):
        given = getattr(options, field, None)
        if given is not None and ".py:" not in str(given):
            check(given)
    named = getattr(options, "metric", None) or ()
    for name in (named,) if isinstance(named, str) else named:
        check_name(name)


@dataclass(frozen=True)
class CalibrationOptions:
    """What `calibration` reads, for commands that run several methods."""

    method: str
    recovery: str | None
    data: str | None
    samples: int
    length: int
    batch_size: int
    seed: int

    @classmethod
    def of(cls, options: Any, method: str, seed: int) -> CalibrationOptions:
        return cls(
            method, None, options.data, options.samples, options.length, options.batch_size, seed
        )


@dataclass(frozen=True)
class Measured:
    """What commands take that prune one model by several methods and measure it.

    tyro shows these options beside those of the command's own class, in the order of both.
    """

    methods: tuple[str, ...] = ()
    """Registered one-shot methods."""
    plugin: Plugins = ()
    metric: str | None = None
    """One metric, as `sparseworks prune` takes it; default: the first that fits the model."""
    data: str | None = None
    """Calibration data, for methods that need it."""
    samples: Samples = 128
    length: Length = 256
    batch_size: BatchSize = 8
    eval_data: str | None = None
    """Evaluation data of the metric."""
    eval_samples: int | None = None
    """Evaluation windows, sentences or images."""
    include: tuple[str, ...] = ()
    """Name patterns of the only weights to prune."""
    exclude: tuple[str, ...] = ()
    """Name patterns of weights to leave dense."""
    seeds: tuple[int, ...] = (0,)
    """Of random methods and of calibration samples; with several, each is measured."""
    dtype: str | None = None
    """fp32, bf16 or fp16; default fp32."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force."""
    force: bool = False
    """Write into a folder that exists."""
    resume: bool = False
    """Go on with a sweep into --out that was interrupted, with the same options."""
    share: bool = False
    """Work on --out together with other processes of the same command: begin it, or join it."""
    ray: bool = False
    """Spread the work over a Ray cluster (RAY_ADDRESS, else the processors of this machine)."""
    json: bool = False
    """Print as JSON."""

    def checked(self) -> None:
        """Refuse what is not there before a model is loaded.

        Raises:
            InvalidArgument: an output folder or an option that cannot be used.
        """
        if not self.methods or not self.seeds:
            raise InvalidArgument("give at least one of --methods and one of --seeds")
        if (self.resume or self.share) and self.out is None:
            raise InvalidArgument("--resume and --share go on in a folder: give --out")
        if self.share and (self.ray or self.force):
            raise InvalidArgument(
                "--share takes neither --ray, which shares by itself, nor --force"
            )
        begun = self.share and self.out is not None and (self.out / "tasks").is_dir()
        check_output(self.out, self.force or self.resume or begun)
        check_inputs(self)

    @contextmanager
    def swept(
        self, make: Any, tasks: Mapping[str, tuple[Any, ...]], what: str
    ) -> Iterator[dict[str, Any]]:
        """What the subject that `make(self)` makes answers to every task.

        Each answer is written into the folder "tasks" of --out as soon as it is there; the folder
        goes when the block, which is to write the result, ends well.
        """
        from sparseworks.cli.running import plain_options, progress_bar
        from sparseworks.diagnostics.sharing import How, Shared
        from sparseworks.diagnostics.sweeping import Cluster, sweep

        shared = None
        with (
            Cluster() if self.ray else nullcontext() as cluster,
            progress_bar(what, quiet=self.json) as progress,
        ):
            if self.out is not None:
                # no answer depends on these
                aside = ("out", "force", "resume", "share", "ray", "json")
                asked = {k: v for k, v in plain_options(self).items() if k not in aside}
                how: How = "join" if self.share else "resume" if self.resume else "new"
                shared = Shared(self.out / "tasks", asked, how)
            try:
                folder = None if shared is None else shared.folder
                found = sweep(
                    partial(make, self), tasks, folder=folder, cluster=cluster, progress=progress
                )
            except BaseException:
                if shared is not None:
                    shared.abandon()
                raise
        yield found
        if shared is not None:
            shared.finish()

    def batches(self, loaded: Any, method: str, seed: int) -> list[Any] | None:
        """Calibration batches for one method."""
        return calibration(loaded, CalibrationOptions.of(self, method, seed))


def calibration(loaded: Any, options: Any) -> list[Any] | None:
    """Calibration batches that fit the model; None where the method needs none."""
    from sparseworks.core import registry
    from sparseworks.data import load
    from sparseworks.weights.oneshot.sensitivity import measured_budget

    needs = registry.resolve(options.method).info.needs
    recovery = getattr(options, "recovery", None)
    budget = measured_budget(getattr(options, "budget", None))
    if not needs and recovery is None and not (budget and budget.needs):
        return None
    source = options.data
    if source is not None and ".py:" in source:
        return own_batches(source)
    if source is None:
        if loaded.tokenizer is None:
            raise InvalidArgument(
                f"method {options.method!r} calibrates on data and this model reads no text: "
                "give --data (a parquet file, an image folder, digits)"
            )
        source = "docstrings"
    kind: Any = None
    if loaded.tokenizer is not None:
        kind = "passages" if loaded.kind in ("encoder", "classifier") else "windows"
    return load(
        source,
        tokenizer=loaded.tokenizer,
        kind=kind,
        samples=options.samples,
        length=min(options.length, 128) if kind == "passages" else options.length,
        batch_size=options.batch_size,
        seed=options.seed,
    )


def own_batches(source: str) -> list[Any]:
    """The batches of the user's "file.py:name": a list, or a function that makes one."""
    from sparseworks.diagnostics.metrics import load_object

    found = load_object(source)
    return list(found() if callable(found) else found)


def make_metrics(
    names: Sequence[str], loaded: Any, eval_data: str | None, samples: int | None
) -> list[Any]:
    """Metrics by name, on the dense model."""
    from sparseworks.diagnostics.metrics import get_metric

    made = []
    for name in names:
        count = samples
        if count is None and name == "perplexity":
            count = 64
        made.append(
            get_metric(
                name,
                model=loaded.model,
                tokenizer=loaded.tokenizer,
                data=eval_data,
                samples=count,
            )
        )
    return made


def prompts_of(loaded: Any, options: Any) -> Any:
    """Held-out prompts for a causal language model that generates; else None."""
    from sparseworks.diagnostics.continuations import held_out_prompts

    if options.continuations < 0:
        raise InvalidArgument(f"--continuations {options.continuations}: a number of texts, or 0")
    if loaded.kind != "causal":
        return None
    return held_out_prompts(
        loaded.model, loaded.tokenizer, options.eval_data, count=options.continuations
    )


def one_metric(options: Any, loaded: Any) -> Any:
    """The metric that `options` name, or the first that fits the model."""
    from sparseworks.cli.loading import default_metrics

    names = (options.metric,) if options.metric else default_metrics(loaded, options.eval_data)
    if not names:
        raise InvalidArgument("no metric fits this model by itself: give --metric and --eval-data")
    (metric,) = make_metrics(names[:1], loaded, options.eval_data, options.eval_samples)
    return metric
