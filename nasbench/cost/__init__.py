"""From a placement to its speed and cache: measured rows summed, calibrated, with an uncertainty. Imports no torch."""

from nasbench.cost.calibration import CalibrationRow, add_calibration, find_calibration
from nasbench.cost.files import find_profiles, how_to_get_rows, load_cost_model, profiled_devices, stale_warning
from nasbench.cost.model import Cost, CostModel
from nasbench.profiling.plan import check_context

__all__ = [
    "CalibrationRow",
    "Cost",
    "CostModel",
    "add_calibration",
    "check_context",
    "find_calibration",
    "find_profiles",
    "how_to_get_rows",
    "load_cost_model",
    "profiled_devices",
    "stale_warning",
]
