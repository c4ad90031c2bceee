"""Cells: the program a recurrent network runs at every time step. A new cell is one small file here."""

from unrolled.cells.adapted import as_cell
from unrolled.cells.base import Cell
from unrolled.cells.gru import GRUCell
from unrolled.cells.lstm import LSTMCell
from unrolled.cells.rnn import RNNCell

__all__ = ["Cell", "GRUCell", "LSTMCell", "RNNCell", "as_cell"]
