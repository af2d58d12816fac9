"""Multi-head latent attention (arXiv 2405.04434): what a decode step does between its products."""
