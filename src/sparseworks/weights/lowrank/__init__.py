"""Low-rank and sparse factors."""
