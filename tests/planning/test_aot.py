"""What is read from the text of compiled programs. The texts are of XLA:TPU (jax 0.10.2, libtpu 0.0.42), shortened."""

import jax
import pytest
from jax.sharding import AbstractMesh

from mindvl_jax.config import loader
from mindvl_jax.core.errors import UserError
from mindvl_jax.planning import aot
from mindvl_jax.planning.exchanges import exchanges

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
    config, mesh = loader.load("configs/smoke.yaml", SETTINGS), AbstractMesh((1, 4, 1), ("data", "fsdp", "tensor"))
    assert [fault.removesuffix(" in ") for fault in aot.faults_of(line, config, 0, mesh)] == [FAULTS[line]]


@pytest.mark.parametrize("line", [
    "  %x = bf16[1,512,256]{1,2,0} all-gather(%a), channel_id=1",  # a weight
    "  %x = s32[8,96,1]{2,1,0} all-gather(%a), channel_id=1",  # token ids
    "  %x = f32[1,96,8]{2,1,0} all-to-all(%a), channel_id=1",  # the embedding's columns
])  # fmt: skip
def test_weights_ids_and_the_embeddings_columns_are_none(line):
    config, mesh = loader.load("configs/smoke.yaml", SETTINGS), AbstractMesh((1, 4, 1), ("data", "fsdp", "tensor"))
    assert aot.faults_of(line, config, 0, mesh) == []


def test_without_libtpu_the_message_says_how_to_get_it(monkeypatch):
    from jax.experimental import topologies

    def missing(*args, **keywords):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no TPU support in this build")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match="needs libtpu .`make aot` installs it. and a name such as v5p:4x4x4"):
        aot.topology_devices("v5p:2x2x1")


def test_the_page_keeps_its_words_and_takes_a_new_table(tmp_path):
    page = tmp_path / "aot.md"
    page.write_text(f"before\n{aot.BEGIN}old\n{aot.END}after\n")
    case = aot.EVERYDAY[0]
    aot.write(
        page,
        [
            aot.Compiled(
                case, "train_step", {"data": 1, "fsdp": 4, "tensor": 1}, 2**30, 2**31, exchanges(TEXT), seconds=61
            )
        ],
    )
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (
        "| v5p:2x2x1 | fsdp 4 | 1.00 | 2.00 | 2 all-gather, 2 all-reduce, 1 all-to-all, 1 reduce-scatter | 0 | 61 s |"
        in text
    )
