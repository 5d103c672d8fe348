"""docs/operators.md lists the kernels as they are."""

import re

from npu_bridge.kernels import KERNELS, table

FIGURE = re.compile(r"\d\.\de[+-]\d\d")


def test_the_page_of_operators_is_current_but_for_its_measured_figures():
    # The figures move in their last digit with the machine; everything else must be what the generator writes today.
    today = table.render({name: {"float32": 0.0, "bfloat16": 0.0} for name in KERNELS})
    written = table.DESTINATION.read_text()

    def blank(text):
        return [FIGURE.sub("#", line) for line in text.splitlines()]

    assert blank(written) == blank(today), "run: python -m npu_bridge.kernels.table"


def test_every_figure_on_the_page_is_within_its_tolerance():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\S+) \| (\S+) \| [^|]*\|$", table.DESTINATION.read_text(), re.MULTILINE)
    assert len(rows) >= len(KERNELS) - 2  # notes may hold an escaped bar
    for name, *figures in rows:
        for dtype, figure in zip(("float32", "bfloat16"), figures):
            assert float(figure) <= KERNELS[name].tolerance[dtype], f"{name} {dtype}: {figure}"
