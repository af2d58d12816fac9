"""The search: an objective, strategies that propose placements, and the trials they leave in files. No torch here."""
