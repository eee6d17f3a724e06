"""Where the benchmarks stand: the clone, their settings and their result files."""

from pathlib import Path

__all__ = ["CONFIGS", "RESULTS", "ROOT"]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "benchmarks" / "configs"
RESULTS = ROOT / "benchmarks" / "results"
