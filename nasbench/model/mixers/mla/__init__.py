"""C: multi-head latent attention."""
