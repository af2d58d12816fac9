"""A: full attention."""
