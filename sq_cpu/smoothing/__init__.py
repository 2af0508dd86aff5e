"""From a calibration to the smoothing scales, and into the weights."""
