"""G and J: Gated DeltaNet and JetBlock."""
