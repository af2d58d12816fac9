"""SwiGLU and SiLU."""
