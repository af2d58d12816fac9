from supernet_tiny import one_thread, text_file, tiny_model

__all__ = ["one_thread", "text_file", "tiny_model"]
