"""Files of text, sound and images as what a model takes, whatever its kind."""
