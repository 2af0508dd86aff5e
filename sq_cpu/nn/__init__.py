"""Modules that run on the kernels."""
