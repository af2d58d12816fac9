"""Text for training: reading it, the hub, packed rows, text that a model writes itself."""
