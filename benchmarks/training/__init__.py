"""One run composed from YAML, grids of runs, and what they leave."""
