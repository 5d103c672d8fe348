"""Parsing the text of a compiled program, against sums by hand. The texts are of XLA:TPU, shortened."""

import pytest

from mindvl_jax.cli.main import main
from mindvl_jax.profiling import compiled
from mindvl_jax.profiling.program import Program

MACHINE = compiled.Machine(flops=1e10, memory=1e9, link=1e9)
SCOPE = 'metadata={op_name="jit(train_step)/jvp(language)/layers/while/body/mlp/dot_general"}'
WINDOW = "window={size=2 pad=1_1 rhs_reversal=1}"
TEXT = f"""
%fused (p0: bf16[12,64,32], p1: s32[]) -> bf16[1,64,32] {{
  %p0 = bf16[12,64,32]{{2,1,0}} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = bf16[1,64,32]{{2,1,0}} dynamic-slice(%p0, %p1), dynamic_slice_sizes={{1,64,32}}
}}

%product (a: bf16[192,64], b: bf16[64,32]) -> f32[192,32] {{
  %a = bf16[192,64]{{1,0}} parameter(0)
  %b = bf16[64,32]{{1,0}} parameter(1)
  ROOT %conv = f32[192,32]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}

%rows (a: bf16[32,64,1], b: bf16[2,64,96]) -> f32[2,32,96] {{
  %a.1 = bf16[32,64,1]{{2,1,0}} parameter(0)
  %b.1 = bf16[2,64,96]{{2,1,0}} parameter(1)
  ROOT %conv.1 = f32[2,32,96]{{2,1,0}} convolution(%a.1, %b.1), {WINDOW}, dim_labels=bf0_0io->0bf
}}

%condition (arg: (s32[], bf16[12,64,32])) -> pred[] {{
  %bound = s32[] constant(12)
  %arg = (s32[], bf16[12,64,32]{{2,1,0}}) parameter(0)
  %counter = s32[] get-tuple-element(%arg), index=0
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}}

%body (arg: (s32[], bf16[12,64,32], bf16[192,64])) -> (s32[], bf16[12,64,32]) {{
  %arg.1 = (s32[], bf16[12,64,32]{{2,1,0}}, bf16[192,64]{{1,0}}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%arg.1), index=0
  %weights = bf16[12,64,32]{{2,1,0}} get-tuple-element(%arg.1), index=1
  %x = bf16[192,64]{{1,0}} get-tuple-element(%arg.1), index=2
  %one = bf16[1,64,32]{{2,1,0}} fusion(%weights, %counter.1), kind=kLoop, calls=%fused, {SCOPE}
  %start = (bf16[64,32]{{1,0}}, bf16[256,32]{{1,0}}) all-gather-start(%one), channel_id=1, dimensions={{0}}, {SCOPE}
  %y = f32[192,32]{{1,0}} fusion(%x, %one), kind=kOutput, calls=%product, {SCOPE}
  %done = bf16[256,32]{{1,0}} all-gather-done(%start)
  %alone = bf16[256,32]{{1,0}} all-gather(%one), channel_id=2, dimensions={{0}}, {SCOPE}
  ROOT %next = (s32[], bf16[12,64,32]{{2,1,0}}) tuple(%counter.1, %weights)
}}

ENTRY %main (p: bf16[12,64,32]) -> bf16[12,64,32] {{
  %p = (s32[], bf16[12,64,32]{{2,1,0}}) parameter(0)
  %loop = (s32[], bf16[12,64,32]{{2,1,0}}) while(%p), condition=%condition, body=%body
  ROOT %last = bf16[12,64,32]{{2,1,0}} get-tuple-element(%loop), index=1
}}
"""
PRODUCT = 2 * 192 * 64 * 32
LAYER = 64 * 32 * 2  # bytes


def mlp():
    return compiled.by_block(Program(TEXT), MACHINE)["language mlp, forward"]


def test_a_loop_counts_as_often_as_its_condition_says():
    assert mlp().flops == 12 * PRODUCT


def test_a_batch_dim_that_is_written_as_a_window_over_padding_multiplies_nothing_twice():
    program = Program(TEXT)
    (convolution,) = [one for one in program.computations["rows"] if one.opcode == "convolution"]
    assert program.flops("rows", convolution) == PRODUCT


def test_of_stacked_weights_that_a_fusion_slices_one_layer_is_read():
    product = 192 * 64 * 2 + LAYER + 192 * 32 * 4
    assert mlp().bytes == 12 * (2 * LAYER + 4 + product)


def test_time_of_an_operation_is_the_longer_of_its_products_and_its_bytes():
    assert mlp().seconds == pytest.approx(12 * (PRODUCT / MACHINE.flops + (2 * LAYER + 4) / MACHINE.memory))


def test_an_exchange_is_waited_for_unless_computation_stands_between_its_start_and_end():
    (found,) = compiled.transfers(Program(TEXT))
    assert (found.kind, found.count, found.exposed) == ("all-gather", 24, 12)
    assert found.bytes == 24 * 256 * 32 * 2


def test_the_prediction_is_of_a_configuration_and_of_no_run(capsys):
    for wrong in (["--run", "somewhere"], ["--config", "smoke", "--steps", "1..2"]):
        assert main(["profile", *wrong, "--aot", "v5p:2x2x1"]) == 2
        assert "--aot predicts steps of --config" in capsys.readouterr().err
    assert main(["profile", "--config", "smoke", "--aot", "v9:2x2"]) == 2
    assert "no chip 'v9' among" in capsys.readouterr().err
