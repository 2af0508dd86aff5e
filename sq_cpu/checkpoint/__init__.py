"""A quantized model as a folder of files, and float models from where they are."""
