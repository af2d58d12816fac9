from supernet_tiny import make_run, one_thread, text_file, tiny_model

__all__ = ["make_run", "one_thread", "text_file", "tiny_model"]
