"""Every operator the bridge emits, by the call it makes on an NPU, against its formula in float64."""

import pytest
import torch
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)

import npu_bridge.emulator as emulator
from npu_bridge.kernels import KERNELS
from npu_bridge.kernels.check import measure


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_fused_call_of_an_operator_agrees_with_its_formula(name, dtype, record_property):
    with torch.inference_mode(), emulator.count() as counts:
        error = measure(name, dtype, "npu")
    record_property("error", f"{error:.1e}")
    record_property("kernels", ", ".join(f"{k.removeprefix('aclnn')} {n}" for k, n in counts.kernels.items()))
    tolerance = KERNELS[name].tolerance[dtype]
    assert error <= tolerance, f"{name} in {dtype} is off by {error:.2e}, allowed {tolerance:.1e}"
