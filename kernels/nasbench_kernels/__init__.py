"""The operations of linear attention, a folder each: `naive.py` is the token-by-token truth, README.md the maths."""
