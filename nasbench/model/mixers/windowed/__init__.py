"""H: a short sliding window and a JetBlock side by side in one layer."""
