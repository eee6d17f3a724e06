"""Runs composed from YAML, grids of runs, and their results."""
