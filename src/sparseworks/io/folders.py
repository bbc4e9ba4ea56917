"""Hugging Face folders: packed (`save`) or plain (`export_dense`), complete or not there.

A packed folder holds config.json with a `sparseworks` note, generation_config.json, the tokenizer
and sparseworks.safetensors. The weights have a name of their own on purpose: transformers looks
for model.safetensors, would find only a part of each packed tensor there and fill the rest with
random numbers; so it says that there are no weights instead.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, MissingDependency, ModelError
from sparseworks.core.masks import masks
from sparseworks.core.types import Progress
from sparseworks.io.atomic import atomic_file, atomic_folder
from sparseworks.io.gather import unwrap
from sparseworks.io.opening import PACKED_NAME
from sparseworks.io.sealed import text_seal
from sparseworks.io.summary import CheckpointInfo
from sparseworks.io.writing import refuse_pickle_target, write_dense, write_packed

__all__ = [
    "export_dense", "require_transformers_model", "save_folder", "write_plain_folder",
    "write_side_files",
]  # fmt: skip

_SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config_sentence_transformers.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)


def save_folder(
    model: nn.Module,
    path: Path,
    tokenizer: Any = None,
    progress: Progress | None = None,
    signed_zeros: bool = True,
) -> CheckpointInfo:
    """Write a packed Hugging Face folder; see `save` for the arguments."""
    require_transformers_model(model, path)
    others = _other_weights(path, keep=(PACKED_NAME,))
    if others:
        raise InvalidArgument(
            f"{path}: holds {others[0]}, other weights that would be read instead; "
            "save to a new folder"
        )
    with atomic_folder(path, last=PACKED_NAME) as temporary:
        info = write_packed(model, temporary / PACKED_NAME, progress, signed_zeros)
        record = masks(model)
        note = {
            "version": info.version,
            "weights": PACKED_NAME,
            "load_with": "sparseworks.from_pretrained",
            "method": record.method if record is not None else "",
            "sparsity": round(record.sparsity(), 6) if record is not None else None,
        }
        _write_config(model, temporary, note)
        _write_tokenizer(model, temporary, tokenizer)
    return replace(info, path=path)


@torch.no_grad()
def export_dense(model: nn.Module, path: str | os.PathLike[str], *, tokenizer: Any = None) -> Path:
    """Write a model with its zeros stored, for tools that know nothing of sparsity.

    Args:
        model: a transformers model for a folder that plain `from_pretrained` loads; any module for
            a file, which `safetensors.torch.load_model` loads.
        path: of a folder, or of a file that ends in ".safetensors".
        tokenizer: for a folder, as in `save`.

    Returns:
        The path.

    Raises:
        InvalidArgument, ModelError, CheckpointError: as `save`.
    """
    path, model = Path(path), unwrap(model)
    refuse_pickle_target(path)
    if path.suffix == ".safetensors":
        if tokenizer is not None:
            raise InvalidArgument(f"{path}: a tokenizer can only be saved into a folder")
        with atomic_file(path) as temporary:
            write_dense(model, temporary)
        return path
    require_transformers_model(model, path)
    with write_plain_folder(model, path, tokenizer):
        pass
    return path


@contextlib.contextmanager
def write_plain_folder(
    model: Any, path: Path, tokenizer: Any, state: Mapping[str, Tensor] | None = None
) -> Iterator[Path]:
    """A folder as transformers writes it, complete when the block ends well.

    Args:
        model: of transformers.
        path: of the folder.
        tokenizer: as in `save`.
        state: what is stored; None: the model's own tensors.

    Yields:
        The temporary folder with all files in it, to be changed.
    """
    if (path / PACKED_NAME).exists():
        raise InvalidArgument(
            f"{path}: holds {PACKED_NAME}, which would be read instead; export to a new folder"
        )
    config = model.config
    note = config.__dict__.pop("sparseworks", None)
    try:
        with atomic_folder(path, last="model.safetensors") as temporary:
            model.save_pretrained(temporary, state_dict=None if state is None else dict(state))
            _write_tokenizer(model, temporary, tokenizer)
            yield temporary
    finally:
        if note is not None:
            config.sparseworks = note


def require_transformers_model(model: nn.Module, path: Path) -> None:
    """Raise unless it is a model of transformers with floating weights."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise MissingDependency(
            f"{path}: a folder needs transformers; install sparseworks[hf], or give a file name "
            "that ends in .safetensors"
        ) from error
    if not isinstance(model, PreTrainedModel):
        raise InvalidArgument(
            f"{path}: a folder is for transformers models; for a {type(model).__name__} give a "
            "file name that ends in .safetensors"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{path}: the model is quantized; only unquantized models can be saved")


def _other_weights(path: Path, keep: tuple[str, ...]) -> list[str]:
    """Weight files of a folder that a reader could take for the model."""
    if not path.is_dir():
        return []
    names = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    index = [p.name for p in path.iterdir() if p.name.endswith(".index.json")]
    return [n for n in (*names, *index) if n not in keep]


def write_side_files(model: nn.Module, folder: Path) -> None:
    """All but the weights of a plain folder, as `export_dense` writes them."""
    _write_config(model, folder, None)
    _write_tokenizer(model, folder, None)


def _write_config(model: Any, folder: Path, note: dict[str, Any] | None) -> None:
    """config.json as `save_pretrained` writes it, with the note; and the generation config."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if getattr(config, "tie_word_embeddings", False) and _is_untied(model):
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if note is not None:
        held = {p.name: json.loads(p.read_text()) for p in sorted(folder.glob("*config.json"))}
        seals = {name: text_seal(value) for name, value in held.items()}  # without the note
        written = {**held["config.json"], "sparseworks": {**note, "crc32": seals}}
        (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _is_untied(model: Any) -> bool:
    """Whether the output head no longer is the embedding that the config says it is."""
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return False
    if inputs is None or outputs is None:
        return False
    return getattr(outputs, "weight", None) is not getattr(inputs, "weight", None)


def _write_tokenizer(model: Any, folder: Path, tokenizer: Any) -> None:
    if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    source = tokenizer
    if tokenizer is None:
        source = getattr(model, "name_or_path", "") or ""
    elif not isinstance(tokenizer, (str, os.PathLike)):
        raise InvalidArgument(
            f"tokenizer={type(tokenizer).__name__}: give a tokenizer, a processor or a folder"
        )
    if tokenizer is not None and not Path(source).is_dir():
        raise InvalidArgument(f"tokenizer={str(source)!r}: no such folder")
    for name in (*_SIDE_FILES, "1_Pooling/config.json"):
        found = Path(source) / name if source and Path(source).is_dir() else _cached(source, name)
        if found is not None and found.is_file() and not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(found, folder / name)


def _cached(repository: str, name: str) -> Path | None:
    """A file of a hub model that is already on this machine."""
    if not repository:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository, name)
    except (ImportError, ValueError, OSError):
        return None
    return Path(found) if isinstance(found, str) else None
