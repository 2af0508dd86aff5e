"""The stages on one decoder block at a time, for checkpoints that memory cannot hold."""
