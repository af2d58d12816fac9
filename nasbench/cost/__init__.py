"""From a placement to its speed and cache: measured rows summed, calibrated, with an uncertainty. Imports no torch."""

from nasbench.cost.calibration import CalibrationRow, add_calibration, find_calibration
from nasbench.cost.files import find_profiles, load_cost_model, profiled_devices
from nasbench.cost.judge import Judged, Judgement, judge
from nasbench.cost.model import Cost, CostModel, check_context

__all__ = [
    "CalibrationRow",
    "Cost",
    "CostModel",
    "Judged",
    "Judgement",
    "add_calibration",
    "check_context",
    "find_calibration",
    "find_profiles",
    "judge",
    "load_cost_model",
    "profiled_devices",
]
