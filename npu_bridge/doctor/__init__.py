"""Is this machine fit for the bridge? Host, network, operators on the device, collectives, and a training against stored losses.

The checks return findings and print nothing; `mindvl doctor` shows them. They know nothing of any model: a training is a command
and the losses it should print (`training.check`).
"""

from npu_bridge.doctor.findings import Finding, Outcome
from npu_bridge.doctor.host import Host

__all__ = ["Finding", "Host", "Outcome"]
