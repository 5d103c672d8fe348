"""Sizes of HCCL's buffers by process group."""

import sys
import types

import pytest

from npu_bridge.errors import BridgeError
from npu_bridge.runtime import hccl


def test_groups_get_the_sizes_of_their_axes(monkeypatch):
    options = types.SimpleNamespace
    inner = types.SimpleNamespace(
        _distributed_c10d=types.SimpleNamespace(ProcessGroupHCCL=types.SimpleNamespace(Options=options))
    )
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(_C=inner))
    monkeypatch.setenv(hccl.VARIABLE, "tensor=400, fsdp+data=64")
    monkeypatch.setenv("HCCL_BUFFSIZE", "150")
    assert [hccl.buffer_mb(a) for a in (("tensor",), ("data", "fsdp"), ("data",), ("tensor:1:2",))] == [
        400,
        64,
        150,
        400,
    ]
    assert hccl.group_options("npu", ("data", "fsdp")).hccl_config == {"hccl_buffer_size": 64}
    assert hccl.group_options("npu", ("data",)) is None
    assert hccl.group_options("cuda", ("tensor",)) is None
    monkeypatch.delenv("HCCL_BUFFSIZE")
    assert hccl.buffer_mb(("data",)) == 200


@pytest.mark.parametrize("text", ["tensor", "tensor=", "tensor=-3", "=5", "tensor=0", "a+=5", "a+b=1,b+a=2"])
def test_what_cannot_be_read_is_refused(monkeypatch, text):
    monkeypatch.setenv(hccl.VARIABLE, text)
    with pytest.raises(BridgeError, match=hccl.VARIABLE):
        hccl.own_sizes()
