"""What callbacks and changed networks cost: time, kernels, communication, events, and what they predict."""
