"""What quantization does to each layer, as numbers, figures and a report."""
