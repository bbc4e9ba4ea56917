"""N:M and block methods."""
