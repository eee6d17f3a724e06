"""What several rooms of the benchmarks use: the device that is timed, and where files are."""
