"""Greedy sampling."""
