"""A decoder as it runs: its program, its cache, and generation."""
