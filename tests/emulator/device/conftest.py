"""Tests that run inside the emulator (`make conformance`). Without torch_npu they are not collected."""

import os

collect_ignore_glob = [] if "NPU_EMULATOR_LIBRARIES" in os.environ else ["*"]
