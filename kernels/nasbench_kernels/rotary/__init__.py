"""Rotary embedding; in a decode step together with the write into the KV cache."""
