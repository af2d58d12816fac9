"""M: Mamba2."""
