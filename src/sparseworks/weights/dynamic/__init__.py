"""Sparse training: masks that move while the model trains."""
