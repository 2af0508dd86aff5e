"""Accuracy-aware tuning: many configurations, evaluated by workers that share a study."""
