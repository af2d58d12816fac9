"""Token mixers, a folder per family."""
