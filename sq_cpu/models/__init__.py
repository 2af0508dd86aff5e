"""What is known of a float model: its family, its linears, which of them share an input."""
