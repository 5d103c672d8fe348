"""Parsing the text of compiled programs. The texts are of XLA:TPU (jax 0.10.2, libtpu 0.0.42), shortened."""

import dataclasses

import jax
import pytest

from mindvl_jax.config import loader
from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.exchanges import exchanges, per_layer
from mindvl_jax.planning import aot, topologies
from mindvl_jax.planning.alternatives import Change, Tried, confirm
from mindvl_jax.planning.phase import abstract_mesh

TEXT = """
%all-reduce-scatter.8 (input.8: f32[512,2304]) -> f32[128,2304] {
  %all-reduce.153 = f32[512,2304]{0,1:T(8,128)} all-reduce(%input.8), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%region_23.30
}

%body (arg: (f32[4,8])) -> (f32[4,8]) {
  %all-gather.137 = bf16[1,512,256]{1,2,0:T(8,128)(2,1)} all-gather(%fusion.29), channel_id=238, dimensions={1}, metadata={op_name="jit(train_step)/jvp(language)/layers/while/body/attention/dot_general"}
  %ag = (f32[2,64]{1,0}, f32[8,64]{1,0}) all-gather-start(%x), channel_id=5, dimensions={0}
  %all-to-all.3 = (f32[1,96,8]{2,1,0}, f32[1,96,8]{2,1,0}, /*index=2*/f32[1,96,8]{2,1,0}) all-to-all(%a, %b, %c), channel_id=7, metadata={op_name="jit(train_step)/gather"}
  %done = f32[8,64]{1,0} all-gather-done(%ag)
}

ENTRY %main (p: f32[4,8]) -> f32[] {
  ROOT %all-reduce.2 = (f32[], bf16[96,64]{1,0}) all-reduce(%q, %r), channel_id=9, to_apply=%add, metadata={op_name="jit(train_step)/optimizer/reduce_sum"}
}
"""


def test_exchanges_are_read_with_kind_shape_and_scope_whatever_xla_makes_of_them():
    found = [(e.kind, e.dtype, e.shape) for e in exchanges(TEXT)]
    assert found == [
        ("reduce-scatter", "f32", (512, 2304)),
        ("all-gather", "bf16", (1, 512, 256)),
        ("all-gather", "f32", (8, 64)),
        ("all-to-all", "f32", (1, 96, 8)),
        ("all-reduce", "f32", ()),
        ("all-reduce", "bf16", (96, 64)),
    ]
    assert exchanges(TEXT)[1].scope == "jit(train_step)/jvp(language)/layers/while/body/attention/dot_general"


SETTINGS = ["training.phases.0.sequence_length=96", "training.phases.0.patches_per_row=112"]
FAULTS = {
    "  %x = bf16[2,4,96,96]{3,2,1,0} fusion(%a)": "an array of scores: (2, 4, 96, 96)",
    "  %x = bf16[8,96,64]{2,1,0} all-gather(%a), channel_id=1": "activations are exchanged: all-gather of bf16[8,96,64]",
    "  %x = f32[2,112,64]{2,1,0} all-reduce(%a), channel_id=1": "activations are exchanged: all-reduce of f32[2,112,64]",
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_score_matrix_and_an_exchanged_batch_are_faults_of_a_program_for_fsdp(line):
    config, mesh = loader.load("configs/smoke.yaml", SETTINGS), abstract_mesh(MeshConfig(data=1, fsdp=4, tensor=1))
    assert [fault.removesuffix(" in ") for fault in aot.faults_of(line, config, 0, mesh)] == [FAULTS[line]]


@pytest.mark.parametrize("line", [
    "  %x = bf16[1,512,256]{1,2,0} all-gather(%a), channel_id=1",  # a weight
    "  %x = s32[8,96,1]{2,1,0} all-gather(%a), channel_id=1",  # token ids
    "  %x = f32[1,96,8]{2,1,0} all-to-all(%a), channel_id=1",  # the embedding's columns
])  # fmt: skip
def test_weights_ids_and_the_embeddings_columns_are_none(line):
    config, mesh = loader.load("configs/smoke.yaml", SETTINGS), abstract_mesh(MeshConfig(data=1, fsdp=4, tensor=1))
    assert aot.faults_of(line, config, 0, mesh) == []


def test_tensor_parallelism_may_sum_a_devices_own_rows_and_nothing_else():
    config = loader.load("configs/smoke.yaml", [*SETTINGS, "training.phases.0.rows=8"])
    mesh = abstract_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    own = "  %x = bf16[4,96,64]{2,1,0} all-reduce(%a), channel_id=1"
    columns = "  %x = bf16[8,96,32]{2,1,0} all-reduce(%a), channel_id=1"
    assert aot.faults_of(own, config, 0, mesh) == aot.faults_of(columns, config, 0, mesh) == []
    for other in (own.replace("[4,", "[8,"), own.replace("all-reduce", "all-gather")):
        assert len(aot.faults_of(other, config, 0, mesh)) == 1, other


def test_a_size_that_a_parameter_has_too_is_no_array_of_scores():
    width = loader.load("configs/smoke.yaml", SETTINGS).model.text.hidden_size
    config = loader.load("configs/smoke.yaml", [*SETTINGS, f"training.phases.0.patches_per_row={width}"])
    mesh = abstract_mesh(MeshConfig(data=1, fsdp=4, tensor=1))
    assert aot.faults_of(f"  %x = bf16[{width},{width}]{{1,0}} fusion(%a)", config, 0, mesh) == []
    assert aot.faults_of("  %x = bf16[96,96]{1,0} fusion(%a)", config, 0, mesh) != []


LAYER = """
%scatter.1 (input.8: bf16[512,256]) -> bf16[128,256] {
  %all-reduce.1 = f32[512,256]{1,0} all-reduce(%input.8), channel_id=1, to_apply=%region
}

%body (arg: (f32[4,8])) -> (f32[4,8]) {
  %g.1 = bf16[512,256]{1,0} all-gather(%w), channel_id=2, dimensions={0}, metadata={op_name="jit(train_step)/jvp(language)/layers/while/body/mlp/dot_general"}
  %g.2 = bf16[512,256]{1,0} all-gather(%w), channel_id=3, dimensions={0}, metadata={op_name="jit(train_step)/transpose(jvp(language))/layers/while/body/mlp/dot_general"}
  %s.1 = f32[128,256]{1,0} fusion(%g), kind=kCustom, calls=%scatter.1, metadata={op_name="jit(train_step)/transpose(jvp(language))/layers/while/body/mlp/dot_general"}
}

ENTRY %main (p: f32[4,8]) -> f32[] {
  %g.3 = bf16[96,512]{1,0} all-gather(%e), channel_id=4, metadata={op_name="jit(train_step)/jvp(language)/loss"}
}
"""


def test_exchanges_of_a_layer_are_those_of_the_loop_over_layers_and_a_wrapped_one_has_the_scope_of_its_wrap():
    assert per_layer(exchanges(LAYER)) == {
        "forward": {"all-gather": 1},
        "back": {"all-gather": 1, "all-reduce": 1},
    }


def test_more_exchanges_in_a_layer_than_the_case_allows_are_faults():
    allowed = {("forward", "all-gather"): 1, ("back", "all-gather"): 1, ("back", "all-reduce"): 1}
    case = aot.Case("configs/smoke.yaml", "v5p:2x2x1", 0, layer=allowed)
    assert aot.layer_faults(LAYER, case) == []
    fewer = dataclasses.replace(case, layer=allowed | {("back", "all-gather"): 0})
    assert aot.layer_faults(LAYER, fewer) == ["a layer has 1 all-gather back, expected at most 0"]


@pytest.mark.parametrize(
    ("kind", "devices", "topology"),
    [
        ("TPU v5p", 64, "v5p:4x4x4"),
        ("TPU v6e", 256, "v6e:16x16"),
        ("TPU v6 lite", 8, "v6e:2x4"),
        ("NVIDIA H100", 64, "h100:1x8x8"),
    ],
)
def test_devices_of_a_kind_have_their_usual_topology(kind, devices, topology):
    assert topologies.topology_of(kind, devices) == topology


def test_a_kind_without_a_compiler_here_and_an_unusual_number_are_refused_in_words():
    with pytest.raises(UserError, match="known are TPU v4, TPU v5p"):
        topologies.topology_of("Ascend 910B", 8)
    with pytest.raises(UserError, match="name the shape of TPU v5p, such as --compile v5p:4x4x4"):
        topologies.topology_of("TPU v5p", 7)


def test_without_libtpu_the_message_says_how_to_get_it(monkeypatch):
    from jax.experimental import topologies as of_jax

    def missing(*args, **keywords):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no TPU support in this build")

    monkeypatch.setattr(of_jax, "get_topology_desc", missing)
    with pytest.raises(UserError, match="needs libtpu .`make aot` installs it. and a name such as v5p:4x4x4"):
        topologies.topology_devices("v5p:2x2x1")
    with pytest.raises(UserError, match="needs jax-cuda12-plugin"):
        topologies.topology_devices("h100:1x1x8")


def test_the_page_keeps_its_words_and_other_cases_and_takes_new_lines(tmp_path):
    page = tmp_path / "aot.md"
    page.write_text(f"before\n{aot.BEGIN}old\n{aot.END}after\n")
    case = aot.EVERYDAY[0]
    one = aot.Compiled(
        case, "train_step", {"data": 1, "fsdp": 4, "tensor": 1}, 2**30, 2**31, exchanges(TEXT), seconds=61
    )
    aot.write(page, [one])
    aot.write(page, [dataclasses.replace(one, mesh={"data": 1, "fsdp": 2, "tensor": 2})])
    aot.write(page, [dataclasses.replace(one, faults=["does not fit"])])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    kinds = "2 all-gather, 2 all-reduce, 1 all-to-all, 1 reduce-scatter"
    assert (
        f"| v5p:2x2x1 | fsdp 4 | does not fit | 1.00 | 2.00 | forward 1 all-gather | {kinds} | 0 | 61 s (0 s) |" in text
    )
    assert "| v5p:2x2x1 | fsdp 2 x tensor 2 | fits |" in text and text.count("v5p:2x2x1") == 2


def test_a_proposal_that_its_compiler_says_does_not_fit_is_not_proposed():
    class Planned:
        def __init__(self, total):
            self.total = total

    class Compiler:
        def __init__(self, overrides):
            self.overrides = overrides

        def plan(self):
            if "mesh.fsdp=128" in self.overrides:
                raise UserError("the mesh is for 128 devices")
            return [Planned(70 if "model.remat=full" in self.overrides else 90)]

    tried = [
        Tried(Change(("model.remat=full",), ""), 60, True),
        Tried(Change(("training.loss_chunk=256",), ""), 60, True),
        Tried(Change(("mesh.fsdp=128",), ""), 60, True),
        Tried(Change(("mesh.tensor=2",), ""), 95, False),
    ]
    found = confirm(tried, Compiler, usable=80)
    assert [(one.bytes, one.fits) for one in found] == [(70, True), (90, False), (60, False), (95, False)]
    assert "by its compiler it does not" in found[1].why_not and "not compiled" in found[2].why_not
