"""What runs a model fast: the int8 KV cache and int8 attention."""
