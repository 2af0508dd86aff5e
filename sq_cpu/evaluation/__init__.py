"""How good a model is: perplexity, tasks, regressions against a stored baseline."""
