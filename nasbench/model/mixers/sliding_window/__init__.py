"""W: sliding-window attention."""
