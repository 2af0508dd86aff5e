"""What runs a model fast: a decoder's program, the int8 KV cache and int8 attention."""
