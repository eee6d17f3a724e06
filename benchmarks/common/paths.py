"""Paths of the clone, of settings and of result files."""

from pathlib import Path

__all__ = ["CONFIGS", "RESULTS", "ROOT"]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "benchmarks" / "configs"
RESULTS = ROOT / "benchmarks" / "results"
