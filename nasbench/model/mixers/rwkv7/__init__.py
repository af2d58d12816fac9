"""R: RWKV7's time mixing."""
