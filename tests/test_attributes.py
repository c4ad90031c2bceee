"""What a user sees of a network by `rnn.<TAB>`: what is for users, and nothing of how it works."""

import pytest
from torch import nn

import unrolled as ur

OPTIONS = {"batch_first", "truncation", "checkpointing"}
BOUNDS = {"horizon", "stride", "memory", "checkpoint", "windows"}
LAYER = {"input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"}
LAYER |= {"reset_parameters", "flatten_parameters", "network", "step"}  # which a layer of one's own overrides
WEIGHTS = {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}

NETWORKS = {
    "unroll": (
        lambda: ur.unroll(ur.GRUCell(3, 4)),
        OPTIONS | BOUNDS | {"cell", "reverse", "engine", "run_by", "ran", "plan"},
    ),
    "stack": (
        lambda: ur.stack([ur.GRUCell(3, 4)]),
        OPTIONS | BOUNDS | {"layers", "dropout", "parts", "networks", "plan"},
    ),
    "Bidirectional": (
        lambda: ur.Bidirectional(ur.GRUCell(3, 4), ur.GRUCell(3, 4)),
        OPTIONS | {"forwards", "backwards", "parts", "networks", "plan"},
    ),
    "RNN": (lambda: ur.RNN(3, 4), LAYER | WEIGHTS | {"nonlinearity"}),
    "LSTM": (lambda: ur.LSTM(3, 4), LAYER | WEIGHTS),
    "GRU": (lambda: ur.GRU(3, 4), LAYER | WEIGHTS),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_shows_what_is_for_users(name: str) -> None:
    made, shown = NETWORKS[name]
    found = {attribute for attribute in dir(made()) if not attribute.startswith("_")}
    assert found - set(dir(nn.Module())) == shown
