"""Importing this module registers the built-in strategies. Third parties use the entry point `nasbench.strategies`."""

from nasbench.search import beam, exact, gates, optuna_study, sampling
from nasbench.search.session import STRATEGIES

__all__ = ["STRATEGIES", "beam", "exact", "gates", "optuna_study", "sampling"]
