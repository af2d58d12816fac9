"""FFNs: gated, mixtures of experts, none."""
