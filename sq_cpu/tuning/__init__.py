"""The search of alpha and clips, offline, on what a calibration holds."""
