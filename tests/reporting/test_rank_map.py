"""The rank map: module names cut into block and projection, and what their ranks sum up to."""

import random

import pytest
from helpers import MLP, bert, full, gpt2, llama
from torch import nn

import l1ra
from l1ra.layers.adapted_model import find_adapters
from l1ra.reporting.rank_map import places, rank_grid, ranks_by_depth


def moved(model):
    """Adapters in ``model``, resized to ranks of all sizes; its report."""
    l1ra.patch(model, 60)
    dice = random.Random(0)
    for _, layer in find_adapters(model):
        layer.resize(full(layer.rank, dice.randrange(4)))
    return l1ra.report(model)


def sequential():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def one_layer():
    return nn.ModuleDict({"head": nn.Linear(6, 8)})


BERT = {
    "attention.self.query": 2,
    "attention.self.key": 2,
    "attention.self.value": 2,
    "attention.output.dense": 2,
    "intermediate.dense": 2,
    "output.dense": 2,
    "bert.pooler.dense": 1,
}
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA = dict.fromkeys([*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], 2)
GPT2 = dict.fromkeys(["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], 2)
MODELS = [
    (bert, BERT, [0, 1, None]),
    (llama, LLAMA, [0, 1]),
    (gpt2, GPT2, [0, 1]),
    (MLP, {"layers": 3}, [0, 1, 2]),
    (sequential, {"layer": 3}, [0, 2, 4]),
    (one_layer, {"head": 1}, [None]),
]


@pytest.mark.parametrize(("make", "layers", "blocks"), MODELS, ids=[make.__name__ for make, _, _ in MODELS])
def test_projections_and_blocks_are_found_and_agree_with_the_ranks(make, layers, blocks):
    report = moved(make())
    kinds = report.by_projection
    assert {name: kind.layers for name, kind in kinds.items()} == layers and list(kinds) == list(layers)
    assert list(report.by_depth) == blocks
    ranks = sum(row.rank for row in report.rows)
    assert ranks > sum(row.initial_rank for row in report.rows)
    assert sum(report.by_depth.values()) == ranks
    assert sum(kind.mean_rank * kind.layers for kind in kinds.values()) == pytest.approx(ranks)
    assert sum(kind.share_of_ranks for kind in kinds.values()) == pytest.approx(1)
    assert sum(kind.share_of_params for kind in kinds.values()) == pytest.approx(1)


def test_a_projection_has_the_numbers_of_its_layers():
    report = moved(gpt2())
    rows = [row for row in report.rows if row.name.endswith(".mlp.c_proj")]
    kind = report.by_projection["mlp.c_proj"]
    assert kind.mean_rank == sum(row.rank for row in rows) / 2
    assert kind.mean_initial_rank == sum(row.initial_rank for row in rows) / 2
    assert kind.share_of_ranks == sum(row.rank for row in rows) / sum(row.rank for row in report.rows)
    assert kind.share_of_params == sum(row.params for row in rows) / report.params
    assert report.by_depth[1] == sum(row.rank for row in report.rows if row.name.startswith("transformer.h.1."))


def test_depths_go_from_first_to_last_and_the_rest_comes_at_the_end():
    depths = ranks_by_depth({"head": 7, "layers.10.q": 1, "layers.2.q": 2, "layers.2.k": 3, "layers.0.q": 4})
    assert list(depths.items()) == [(0, 4), (2, 5), (10, 1), (None, 7)]


def test_blocks_of_several_stacks_are_summed_and_none_is_lost():
    names = ["encoder.0.q", "decoder.0.q", "0", "layer.0", "layer.1", "pooler"]
    assert set(places(names)) == set(names)
    assert ranks_by_depth(dict.fromkeys(names, 1)) == {0: 4, 1: 1, None: 1}


def test_names_are_cut_into_layer_and_projection():
    ranks = {"model.layers.0.mlp.up": 3, "model.layers.10.mlp.up": 5, "model.layers.10.q": 2, "pooler.dense": 7}
    layers, projections, cells = rank_grid(ranks)
    assert layers == [-1, 0, 10] and projections == ["mlp.up", "q", "pooler.dense"]
    assert cells == {(0, "mlp.up"): 3, (10, "mlp.up"): 5, (10, "q"): 2, (-1, "pooler.dense"): 7}


def test_layers_that_have_no_parts_are_one_projection():
    assert rank_grid({"blocks.0": 1, "blocks.1": 4}) == ([0, 1], ["blocks"], {(0, "blocks"): 1, (1, "blocks"): 4})
    assert rank_grid({"0": 1, "2": 4}) == ([0, 2], ["layer"], {(0, "layer"): 1, (2, "layer"): 4})


def test_stacks_of_layers_are_kept_apart():
    cells = rank_grid({"encoder.layer.0.q": 1, "decoder.layer.0.q": 4, "encoder.layer.0.experts.3.up": 2})[2]
    expected = {"encoder.layer.q": 1, "decoder.layer.q": 4, "encoder.layer.experts.3.up": 2}
    assert cells == {(0, name): rank for name, rank in expected.items()}
