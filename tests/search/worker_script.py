"""One worker of a search on the synthetic objective: `python worker_script.py FOLDER STORAGE EVALUATIONS`.

Every evaluation takes a while, and adds a line to evaluated.txt when it is done.
"""

import os
import sys
import time
from pathlib import Path

from search.synthetic import SyntheticObjective, search

from nasbench.search.session import run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.spaces.placement import format_placement


class Slow(SyntheticObjective):
    def measure(self, placements):
        before = len(self.asked)
        found = super().measure(placements)
        for placement in self.asked[before:]:
            time.sleep(0.01)
            with open(folder / "evaluated.txt", "a") as file:
                file.write(f"{format_placement(placement)}\t{os.getpid()}\n")
        return found


folder = Path(sys.argv[1])
assert "optuna" in STRATEGIES
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.005)
run = search(folder, Slow(), evaluations=int(sys.argv[3]), storage=sys.argv[2], worker=True)
run_search(run, "optuna")
