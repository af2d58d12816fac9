"""The once-for-all supernet: alternatives per layer, losses, closed-form starts, training, finalising."""
