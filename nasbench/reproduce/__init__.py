"""The whole recipe on one model and device, and its table: what `nasbench reproduce` runs."""
