"""Check whether a machine can run the bridge: host, network, operators, collectives, and a training against stored
losses.

The checks return findings and print nothing; `mindvl doctor` shows them. They know no model: a training is a command
and the losses it should print (`training.check`).
"""

from npu_bridge.doctor.findings import Finding, Outcome
from npu_bridge.doctor.host import Host

__all__ = ["Finding", "Host", "Outcome"]
