"""Tests that run inside the emulator (`make conformance`): elsewhere there is no torch_npu, and they are not collected."""

import os

collect_ignore_glob = [] if "NPU_EMULATOR_LIBRARIES" in os.environ else ["*"]
