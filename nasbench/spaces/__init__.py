"""Placements and search spaces: which layer kind stands where. Imports no torch."""
