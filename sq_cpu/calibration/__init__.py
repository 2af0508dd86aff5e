"""What the linears of a model see on sample text."""
