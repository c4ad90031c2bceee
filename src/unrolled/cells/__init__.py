"""Cells: the program a recurrent network runs at every time step. A new cell is one small file here.

In comes a cell of this room, one of torch.nn's, or anybody's module or function; out comes a module with two methods,
`forward(input, state)` and `initial_state`, and a step of it that checks what it returns. Here too is what a cell may
tell about itself (`DescribedCell`). Nothing here knows of sequences, plans or engines.
"""

from unrolled.cells.adapted import as_cell
from unrolled.cells.base import Cell, DescribedCell, GateLayout
from unrolled.cells.gru import GRUCell
from unrolled.cells.layer_norm_lstm import LayerNormLSTMCell
from unrolled.cells.lstm import LSTMCell
from unrolled.cells.min_gru import MinGRUCell
from unrolled.cells.peephole import PeepholeLSTMCell
from unrolled.cells.rnn import RNNCell
from unrolled.cells.slstm import SLSTMCell, SLSTMState

__all__ = [
    "Cell",
    "DescribedCell",
    "GRUCell",
    "GateLayout",
    "LSTMCell",
    "LayerNormLSTMCell",
    "MinGRUCell",
    "PeepholeLSTMCell",
    "RNNCell",
    "SLSTMCell",
    "SLSTMState",
    "as_cell",
]
