"""Devices: what data sheets say of known ones, and what this machine is. Importing this registers the built-in ones."""

from nasbench.devices import ada, ampere, blackwell, hopper, orin
from nasbench.devices.base import DEVICES, DeviceInfo, DeviceSpec
from nasbench.devices.detect import detect, detect_equal, memory_bytes_of

for _family in (blackwell, hopper, ampere, ada, orin):
    for _spec in _family.SPECS:
        DEVICES.register(_spec.slug, _spec)

__all__ = ["DEVICES", "DeviceInfo", "DeviceSpec", "detect", "detect_equal", "memory_bytes_of"]
