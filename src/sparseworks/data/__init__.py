"""Calibration and evaluation batches from files, data sets, iterables, and built-in real sets.

    data.load("corpus.txt", tokenizer=tok, samples=128, length=256)     # calibration windows
    data.load("docstrings", tokenizer=tok, kind="passages")             # built in, no download
    data.load("cifar/train.parquet", samples=512)                       # (images, labels)

Every loader returns a list of batches as `sparseworks.models.calls` describes them.
"""

from sparseworks.data.images import ImageSet, digits, read_images
from sparseworks.data.loading import load
from sparseworks.data.text import passages, random_windows, read_text, windows

__all__ = [
    "ImageSet",
    "digits",
    "load",
    "passages",
    "random_windows",
    "read_images",
    "read_text",
    "windows",
]
