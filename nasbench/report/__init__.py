"""The report: facts, statistics, figures, HTML."""
