"""The search: an objective, strategies that propose placements, and the trials they leave in files. Imports no torch."""
