"""Cells: the program a recurrent network runs at every time step. A new cell is one small file here."""

from unrolled.cells.adapted import as_cell
from unrolled.cells.base import Cell
from unrolled.cells.gru import GRUCell
from unrolled.cells.layer_norm_lstm import LayerNormLSTMCell
from unrolled.cells.lstm import LSTMCell
from unrolled.cells.min_gru import MinGRUCell
from unrolled.cells.peephole import PeepholeLSTMCell
from unrolled.cells.rnn import RNNCell
from unrolled.cells.slstm import SLSTMCell, SLSTMState

__all__ = [
    "Cell",
    "GRUCell",
    "LSTMCell",
    "LayerNormLSTMCell",
    "MinGRUCell",
    "PeepholeLSTMCell",
    "RNNCell",
    "SLSTMCell",
    "SLSTMState",
    "as_cell",
]
