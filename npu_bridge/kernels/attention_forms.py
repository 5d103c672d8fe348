"""The three forms of attention in the kernel table: equivalent, fused on a CPU, fused on an NPU."""

from __future__ import annotations

from npu_bridge.kernels.attention import _npu_attention, _npu_attention_backward, attention, attention_backward
from npu_bridge.kernels.attention_cpu import flash, flash_backward
from npu_bridge.kernels.registry import register

_FORMS = {  # suffix -> (arguments, note)
    "": (
        '"BSND", sparse_mode=3 | 4 with the 2048 triangle, or no mask',
        "mask True = masked; sparse mode 3 is causal from the lower right, 4 a band",
    ),
    "_segments": (
        '"BSND", atten_mask=(B, 1, T, S), sparse_mode=0',
        "a materialised mask: the fall-back where no lengths are given",
    ),
    "_packed": (
        '"TND", actual_seq_qlen=ends, actual_seq_kvlen=ends, sparse_mode=0 | 3 | 4',
        "ends: cumulative, host, no leading 0, at most 1024; v3 with host tensors inside a captured graph",
    ),
}

for _suffix, (_arguments, _note) in _FORMS.items():
    _call = f"torch_npu.npu_fusion_attention(q, k, v, N, {_arguments})"
    register("attention" + _suffix, family="attention", call=_call, npu=_npu_attention, cpu=flash, inside=True, note=_note)(attention)
    _call = f"torch_npu.npu_fusion_attention_grad(q, k, v, g, N, {_arguments}, softmax_max=lse, softmax_sum=1, attention_in=out)"
    register(f"attention{_suffix}_backward", family="attention", call=_call, npu=_npu_attention_backward, cpu=flash_backward, inside=True)(
        attention_backward
    )
