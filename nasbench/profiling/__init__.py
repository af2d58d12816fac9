"""Measuring one block at a time on a device: plan, workload, timing, telemetry."""
