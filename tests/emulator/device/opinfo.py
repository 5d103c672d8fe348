"""torch's own samples for its operators (OpInfo), float32: each on the emulated NPU against the CPU, values and
gradients.

Prints a line of JSON before and after each operator, so that whoever reads knows which one took the process with it.
`python opinfo.py SECONDS [FIRST]` begins at operator number FIRST.
"""

import itertools
import json
import re
import sys
import time
import warnings

import torch
import torch_npu  # noqa: F401
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_map

SAMPLES = 6  # of each operator
# Names of operators whose samples say nothing here, and why.
LEFT_OUT = {
    "as_strided.partial_views": "its samples read a tensor's storage beyond its view, which a copy on the device lacks",
    "tensor_split": "its samples hold index tensors that must stay on the CPU",
    # the device computes in float32, as torch_npu warns
    "float_power": "float64", "double": "float64", "cdouble": "float64",
    "nn.functional.gelu": "torch_npu gives aclnnGelu no `approximate`: what the device computes for tanh is not known",
    }  # fmt: skip
RANDOM = re.compile(r"rand|bernoulli|normal|dropout|multinomial|empty|geometric|exponential|cauchy|uniform")
EMULATOR = re.compile(r"has no emulation|legacy graph-engine operator")
TORCH_NPU = re.compile(
    r"OPS feature not supp|Could not run 'aten::|is not implemented for"
)  # its own words, before any kernel


def on(device, x):
    return tree_map(
        lambda y: (
            y.detach().to(device).requires_grad_(y.requires_grad)
            if isinstance(y, torch.Tensor)
            else "npu"
            if device == "npu" and isinstance(y, torch.device)
            else y
        ),
        x,
    )


def floats(x):
    return [y for y in tree_flatten(x)[0] if isinstance(y, torch.Tensor)]


def run(info, sample, device):
    """-> values of results and of gradients, on the CPU."""
    first, args, kwargs = (on(device, part) for part in (sample.input, sample.args, sample.kwargs))
    if "device" in kwargs:
        kwargs["device"] = device
    torch.manual_seed(0)
    out = floats(info(first, *args, **kwargs))
    values = [y.detach().cpu() for y in out]
    learned = [y for y in floats((first, args, kwargs)) if y.requires_grad]
    differentiable = [y for y in out if y.requires_grad and y.is_floating_point()]
    if info.supports_autograd and learned and differentiable:
        gradients = torch.autograd.grad(
            differentiable, learned, [torch.ones_like(y) for y in differentiable], allow_unused=True
        )
        values += [y.detach().cpu() for y in gradients if y is not None]
    return values


def compare(got, wanted):
    if len(got) != len(wanted):
        return f"{len(got)} results, {len(wanted)} on the CPU"
    for a, b in zip(got, wanted):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype}{list(a.shape)}, {b.dtype}{list(b.shape)} on the CPU"
        try:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
        except AssertionError as error:
            return " ".join(str(error).split())[:200]
    return ""


def judge(info):
    """Return (outcome, message): passed, wrong, refused by the emulator or by torch_npu, raised, no samples."""
    count = 0
    for sample in itertools.islice(
        info.sample_inputs("cpu", torch.float32, requires_grad=info.supports_autograd), SAMPLES
    ):
        try:
            wanted = run(info, sample, "cpu")
        except Exception:
            continue  # the CPU itself refuses the sample, or its gradient
        try:
            difference = compare(run(info, sample, "npu"), wanted)
        except Exception as error:
            text = " ".join(str(error).split())
            name = re.search(r"(aclnn\w+|legacy graph-engine operator \w+)", text)
            by = "refused" if EMULATOR.search(text) else "refused by torch_npu" if TORCH_NPU.search(text) else "raised"
            return by, name[1] if name and by == "refused" else f"{type(error).__name__}: {text}"[:300]
        if difference:
            return "wrong", difference
        count += 1
    return ("passed", f"{count} samples") if count else ("no samples", "")


def main(seconds, first):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    for number in range(first, len(op_db)):
        if time.monotonic() > end:
            return
        info = op_db[number]
        name = info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")
        if torch.float32 not in info.dtypes or RANDOM.search(info.name) or name in LEFT_OUT:
            continue
        print(json.dumps({"operator": name, "number": number}), flush=True)
        try:
            outcome, said = judge(info)
        except Exception as error:  # making the samples failed
            outcome, said = "no samples", f"{type(error).__name__}"
        print(json.dumps({"operator": name, "number": number, "outcome": outcome, "said": said}), flush=True)
    print(json.dumps({"end": len(op_db)}), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
