import pytest
from supernet_tiny import make_run, one_thread, text_file, tiny_model

__all__ = ["make_run", "one_thread", "text_file", "tiny_model"]


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Thousands of small files wait for no disk. Crashes of the machine are tests/test_foundation.py's."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
