"""Smaller dense models."""
