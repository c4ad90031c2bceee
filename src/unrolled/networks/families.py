"""What the gates of known cells are called, in the order in which a step computes them, and what they do.

For cells that are not listed here gates go by their operation and number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from unrolled.cells import GRUCell, LayerNormLSTMCell, LSTMCell, MinGRUCell, PeepholeLSTMCell, RNNCell, SLSTMCell
from unrolled.networks.torch_layers import GRU, LSTM, RNN, TorchLayer
from unrolled.networks.unroll import Unrolled


@dataclass(frozen=True)
class GateSlot:
    """Where a gate of a known cell stands in one of its biases.

    Attributes:
        bias: the bias of all gates.
        block: which of its entries are this gate's.
    """

    bias: Tensor
    block: slice


@dataclass(frozen=True)
class Family:
    """Cells that have the same gates.

    Attributes:
        computed: names of the activations, in the order in which a step computes them; several where cells differ.
        blocks: names of the blocks of the weights, in their order.
        keeps: the gate by which the state is kept, and whether it does so at its high end.
        takes: the gate by which something new is taken, where it is another one.
    """

    computed: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    keeps: tuple[str, bool] | None = None
    takes: str | None = None

    def idle_end(self, gate: str) -> str | None:
        """The end at which a gate leaves the state as it is, 'low' or 'high'; None for other gates."""
        if self.keeps is not None and gate == self.keeps[0]:
            return "high" if self.keeps[1] else "low"
        return "low" if gate == self.takes else None


_GATES = ("input", "forget", "candidate", "output")
_LAST = ("candidate", "output", "memory")
_LSTM = Family((("forget", "input", *_LAST),), _GATES, ("forget", True), "input")
_TORCH_LSTM = Family((("input", "forget", *_LAST),), _GATES, ("forget", True), "input")
_GRU = Family((("reset", "update", "candidate"),), ("reset", "update", "candidate"), ("update", True))
_RNN = Family((("hidden",),), ("",))
_FAMILIES: dict[type[nn.Module], Family] = {
    **dict.fromkeys((LSTMCell, PeepholeLSTMCell, LayerNormLSTMCell, LSTM), _LSTM),
    nn.LSTMCell: _TORCH_LSTM,
    **dict.fromkeys((GRUCell, GRU, nn.GRUCell), _GRU),
    **dict.fromkeys((RNNCell, RNN, nn.RNNCell), _RNN),
    MinGRUCell: Family((("update",),), ("update", "candidate"), ("update", False)),
    SLSTMCell: Family((("forget", "candidate", "output"), ("candidate", "output")), _GATES, ("forget", True)),
}


def family_of(cell: nn.Module) -> tuple[nn.Module, Family] | None:
    """The known cell in this one (itself, what it wraps, or the layer that it reads) and its family; None for none.

    None too where there are several: nobody can tell then whose gates are whose.
    """
    found = [(module, _FAMILIES[type(module)]) for module in cell.modules() if type(module) in _FAMILIES]
    return found[0] if len(found) == 1 else None


def cells_of(rnn: nn.Module) -> list[nn.Module]:
    """The cells of the unrolled networks in a module, each once; a module without any is taken for a cell itself."""
    wholes = [module.network if isinstance(module, TorchLayer) else module for module in rnn.modules()]
    parts = [part for whole in wholes for part in whole.modules() if isinstance(part, Unrolled)]
    return list(dict.fromkeys(part.cell for part in parts)) or [rnn]


def _suffix(cell: nn.Module) -> str:
    """How the parameters of a layer's cell end."""
    return next((m.suffix for m in cell.modules() if isinstance(getattr(m, "suffix", None), str)), "")


def gate_slots(cell: nn.Module, gate: str) -> list[GateSlot]:
    """Where the biases of a gate are, one for each bias of the cell; none for cells without that gate or biases."""
    known = family_of(cell)
    if known is None or gate not in known[1].blocks:
        return []
    module, family = known
    number, suffix = family.blocks.index(gate), _suffix(cell)
    size = int(module.hidden_size)
    biases = [getattr(module, name + suffix, None) for name in ("bias_ih", "bias_hh")]
    return [GateSlot(bias, slice(number * size, (number + 1) * size)) for bias in biases if bias is not None]


def recurrent_weights(cell: nn.Module, widths: Sequence[int]) -> list[tuple[str, Tensor]]:
    """The square matrices by which a cell's state meets itself, by name; each gate's block is one.

    For cells that are not known: every square parameter as wide as a leaf of the state.
    """
    known = family_of(cell)
    if known is None:
        return [
            (name, weight)
            for name, weight in cell.named_parameters()
            if weight.dim() == 2 and weight.shape[0] == weight.shape[1] and weight.shape[0] in widths
        ]
    module, family = known
    name = "weight_hh" + _suffix(cell)
    weight = getattr(module, name, None)
    if weight is None or weight.shape[0] != len(family.blocks) * weight.shape[1]:
        return []
    blocks = weight.chunk(len(family.blocks))
    return [(f"{name} ({gate})" if gate else name, block) for gate, block in zip(family.blocks, blocks, strict=True)]
