"""Costs of callbacks and of changed networks: time, kernels, communication, events, and predictions from them."""
