"""Framework-free tools: tensors in buffers, keyed randomness, checks of arguments, agreement of ranks."""
