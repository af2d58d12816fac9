"""Pre-trained models: shapes without weights, loading, and our own decoder."""
