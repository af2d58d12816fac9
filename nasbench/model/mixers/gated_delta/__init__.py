"""D, G, J, K, L, T: linear attention with one matrix per head."""
