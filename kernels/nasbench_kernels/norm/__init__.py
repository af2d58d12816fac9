"""RMSNorm after a residual addition, and times an output gate."""
