"""The launch tuner: candidates for a launch, their check against fp32, and the search by whole decode steps.

The caller provides the time of a captured step, so nothing here knows a model (`benchmarks/launches.py` does). Any
operation whose launch `common.launch.launch_for` chooses is found by recording one step.
"""
