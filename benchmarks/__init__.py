"""Scripts that measure everything this project claims."""
