"""Shared code of the benchmarks: the device that is timed, and paths of files."""
