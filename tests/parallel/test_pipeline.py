"""Pipelines: what a table keeps and sends, losses and gradients of a pipelined micro-step, its exchanges."""

import functools
from collections import Counter

import pytest

from mindvl_jax.config.schema import ParallelConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel import pipeline, pipeline_schedules
from mindvl_jax.parallel.exchanges import exchanges
from mindvl_jax.parallel.possible import require_possible
from mindvl_jax.planning.phase import abstract_mesh, lowerings
from mindvl_jax.training.bridge_backend import program_of
from tests.parallel.meshes import TOKENS, WIDTH, compiled, configuration, differences, totals
from tests.parallel.test_possible import sizes

ONE = (("data", 1),)
LAYERS_4 = "model.text.num_layers=4"
INTERLEAVED = ("parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2")
ZERO_BUBBLE = ("parallel.pipeline_schedule=zero_bubble",)
LORA = "adapters={targets: [language/layers/attention/*], rank: 4}"
TIED = ("model.text.tie_word_embeddings=true", "model.remat=full")


def walk(table, stages: int, chunks: int) -> list[tuple[str, int, int]]:
    """Carry a table out with names in place of arrays: (kind, micro-batch, global chunk) of everything that was done.

    An input is ("x", m, chunk), a gradient ("g", m, chunk); anything else that is read is an error of the table.
    """
    inputs, gradients = [{} for _ in range(stages)], [{} for _ in range(stages)]
    done = []
    for t in range(len(table.kind)):
        up, down = [None] * stages, [None] * stages
        for d in range(stages):
            kind, m, number = table.kind[t, d], table.micro_batch[t, d], table.chunk[t, d] * stages + d
            if kind == pipeline.IDLE:
                continue
            last = number == stages * chunks - 1
            if number == 0:
                assert table.first[t, d]
            else:
                assert inputs[d][table.reads[t, d]] == ("x", m, number), f"tick {t}, device {d}"
            if kind in (pipeline.BACKWARD, pipeline.WEIGHTS):
                assert gradients[d][table.pulls[t, d]] == ("g", m, number), f"tick {t}, device {d}"
            names = {pipeline.FORWARD: "F", pipeline.LOSSES: "F", pipeline.BACKWARD: "B", pipeline.WEIGHTS: "W"}
            names |= {pipeline.BACKWARD_LAST: "B", pipeline.WEIGHTS_LAST: "W"}
            assert last == (kind in (pipeline.LOSSES, pipeline.BACKWARD_LAST, pipeline.WEIGHTS_LAST))
            done.append((names[kind], m, number))
            if names[kind] == "F" and not last:
                up[d] = ("x", m, number + 1)
            if names[kind] == "B" and number > 0:
                down[d] = ("g", m, number - 1)
        assert table.up[t] == any(up) and table.down[t] == any(down)
        for d in range(stages):
            if table.up[t]:
                inputs[d][table.takes[t, d]] = up[(d - 1) % stages]
            if table.down[t]:
                gradients[d][table.gets[t, d]] = down[(d + 1) % stages]
    return done


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zero_bubble", "interleaved"])
def test_a_table_reads_what_was_sent_and_does_every_piece_of_work_once(name, stages, rounds):
    chunks, micro_batches = (2 if name == "interleaved" else 1), rounds * stages
    parallel = ParallelConfig(pipeline_schedule=name, pipeline_chunks=chunks)
    table = pipeline.table_of(pipeline.schedule_of(parallel, stages, micro_batches))
    count = Counter(walk(table, stages, chunks))
    last = stages * chunks - 1  # its forward pass is part of its backward pass
    kinds = "FBW" if name == "zero_bubble" else "FB"
    wanted = {(k, m, c) for k in kinds for m in range(micro_batches) for c in range(last + 1)}
    assert count == Counter(wanted - {("F", m, last) for m in range(micro_batches)})
    if name == "1f1b":  # however many micro-batches there are
        assert table.slots <= stages and table.gradient_slots == 1


def test_a_table_without_backward_passes_computes_losses_on_the_last_stage():
    table = pipeline.table_of(pipeline_schedules.forward_alone(3, 4))
    assert Counter(walk(table, 3, 1)) == Counter(("F", m, c) for m in range(4) for c in range(3))
    assert len(table.kind) == 4 + 2 and not table.down.any()


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (4, 2), (3, 4), (4, 3)])
def test_chunks_change_places_in_as_many_permutes_as_a_device_has_chunks(stages, chunks):
    rounds = pipeline.chunk_rounds(stages, chunks)
    assert len(rounds) == chunks
    held = {}
    for by_sender in rounds:
        assert {d for _, d, _ in by_sender} == set(range(stages)), "a permute: one sender for each receiver"
        held |= {(d, there): e * chunks + index for e, (index, d, there) in enumerate(by_sender)}
    assert held == {(d, c): c * stages + d for d in range(stages) for c in range(chunks)}


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        ((("stage", 2), ("fsdp", 2)), ("training.phases.0.loss_reduction=sample",)),
        ((("stage", 2), ("tensor", 2)), (LAYERS_4, *INTERLEAVED)),
        ((("stage", 2), ("context", 2)), ("parallel.context_attention=all_gather", *ZERO_BUBBLE, *TIED)),
        pytest.param((("stage", 2),), ("parallel.pipeline_schedule=gpipe",), marks=pytest.mark.slow),
        pytest.param((("stage", 2), ("data", 2)), ("parallel.micro_batches=1",), marks=pytest.mark.slow),
        pytest.param((("stage", 2), ("context", 2)), (), marks=pytest.mark.slow),
        pytest.param((("stage", 4),), (LAYERS_4, *ZERO_BUBBLE), marks=pytest.mark.slow),
        pytest.param((("stage", 2), ("fsdp", 2)), (LORA,), marks=pytest.mark.slow),
        pytest.param((("stage", 2),), (LORA.replace("4}", "4, dora: true}"),), marks=pytest.mark.slow),
        pytest.param((("stage", 2),), (LORA.replace("4}", "4, base: nf4}"),), marks=pytest.mark.slow),
        pytest.param((("stage", 2),), ("training.phases.0.train=[projector/**]",), marks=pytest.mark.slow),
        pytest.param(
            (("stage", 2), ("fsdp", 2), ("tensor", 2)), ("parallel.sequence_norms=true",), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)  # fmt: skip
def test_loss_and_gradients_are_those_of_one_device(axes, settings):
    one = totals(ONE, *(x for x in settings if not x.startswith("parallel")))
    loss, gradient = differences(totals(axes, *settings), one)
    assert loss <= 1e-6 and gradient <= 1e-5, f"loss differs by {loss:.1e}, a gradient by {gradient:.1e}"


def test_parameters_are_gathered_and_gradients_scattered_once_however_many_micro_batches():
    found = exchanges(compiled((("stage", 2), ("fsdp", 2)), "training.phases.0.loss_reduction=sample")[0].as_text())
    inside = [e for e in found if "shard_map" in e.scope and len(e.shape) > 1 and e.is_float]
    # Two groups of two stages, four rows: a micro-batch is a row. One permute each way in the body of the loop.
    moves = Counter((e.kind, e.shape) for e in inside if "/while/" in e.scope)
    assert moves == {("collective-permute", (1, TOKENS, WIDTH)): 2}
    # Seven matrices of the layer that a stage holds, and the head; nothing of them inside of the loop.
    gathered = [
        e for e in inside if e.kind == "all-gather" and e.shape[1:] != (TOKENS, WIDTH) and e.shape[1:] != (TOKENS,)
    ]
    scattered = [e for e in inside if e.kind == "reduce-scatter" and TOKENS not in e.shape]
    assert len(gathered) == len(scattered) == 8, "\n".join(map(str, inside))
    assert not [e for e in gathered + scattered if "/while/" in e.scope]
    # Rows over the stages: embeddings are gathered for the pipeline, their gradients scattered.
    rows = Counter(e.kind for e in inside if e.shape[1:] == (TOKENS, WIDTH) and "/while/" not in e.scope)
    assert rows == {"all-gather": 1, "reduce-scatter": 1}


@pytest.mark.parametrize(
    ("settings", "axes", "reason"),
    [
        ((), {"stage": 4}, "mesh.stage=4 does not divide model.text.num_layers=2"),
        (INTERLEAVED, {"stage": 2}, "mesh.stage=2 x parallel.pipeline_chunks=2 does not divide model.text.num_layers"),
        (("parallel.context_attention=ring",), {"stage": 2, "context": 2}, "rings wait for all stages"),
        ((), {"stage": 2, "tensor": 4}, "mesh.tensor=4, which does not divide model.text.num_kv_heads=2"),
        ((), {"stage": 2, "fsdp": 4}, "rows=4 cannot be spread over 8 devices"),
        (("parallel.micro_batches=3",), {"stage": 2}, "parallel.micro_batches=3 does not divide the 4 rows"),
        ((LAYERS_4, *INTERLEAVED, "parallel.micro_batches=1"), {"stage": 2}, "1 of training.phases.* no multiple of 2"),
    ],
)  # fmt: skip
def test_a_pipeline_that_cannot_run_is_refused_with_the_reason(settings, axes, reason):
    with pytest.raises(UserError, match=reason):
        require_possible(configuration({}, *settings), sizes(**axes))


def test_the_bridge_moves_micro_batches_alone_inside_of_the_loop_and_gives_each_stage_its_branch():
    config = configuration({"stage": 2, "fsdp": 2}, "backend=npu_bridge")
    mesh = abstract_mesh(config.mesh)
    compile = functools.partial(program_of, config.bridge, mesh=mesh, parallel=config.parallel)
    [low] = [low for name, low in lowerings(config, 0, mesh, compile) if name == "accumulate"]
    found = [c for c in low.collectives() if c["dtype"] == "f32" and len(c["shape"]) > 1]
    axes = [{axis for axis in c["axes"] if mesh.shape[axis] > 1} for c in found]
    ticks = 2 * 2 + 2  # 1F1B of two stages and two micro-batches
    moves = [(c["kind"], c["shape"], c["times"]) for c, on in zip(found, axes, strict=True) if c["times"] > 1]
    assert moves == [("permute", (1, TOKENS, WIDTH), ticks)] * 2, moves
    of_layers = [c for c, on in zip(found, axes, strict=True) if on == {"fsdp"} and len(c["shape"]) == 3]
    kinds = Counter(c["kind"] for c in of_layers if TOKENS not in c["shape"] and c["times"] == 1)
    assert kinds == {"all_gather": 7, "reduce_scatter": 7}, kinds
