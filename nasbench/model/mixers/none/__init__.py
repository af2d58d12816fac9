"""N: no mixer."""
