"""Assertions of helpers say what differs."""

import pytest

pytest.register_assert_rewrite("stages")
