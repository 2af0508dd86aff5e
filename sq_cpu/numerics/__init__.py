"""From floats to integer codes, in plain torch: what the kernels must equal."""
