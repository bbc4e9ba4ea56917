"""Mixtures of experts: one layer, methods that route, and dense models turned into mixtures."""
