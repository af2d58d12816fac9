"""Products of a decode step: for one sequence (gemv) and for 2 to 128 (skinny gemm)."""
