"""Experiments with a protocol of their own: squeezing, shared bases, pruning by gates, depth."""
