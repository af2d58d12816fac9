"""`python -m nasbench`: the same as the `nasbench` script, also in a bare checkout."""

from nasbench.cli.main import main

main()
