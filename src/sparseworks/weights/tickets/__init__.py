"""Lottery tickets and searches over masks."""
