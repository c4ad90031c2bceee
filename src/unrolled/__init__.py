"""Unroll any recurrent cell into weight-sharing copies: see them, train them, know what each one contributed."""

from unrolled import remedy
from unrolled.batches.buckets import BucketSampler
from unrolled.batches.collate import collate_packed, collate_padded
from unrolled.batches.outputs import last_output, pooled, sequence_loss
from unrolled.bptt.memory_plan import MemoryPlan
from unrolled.bptt.schedules import Schedule, revolve, segments, store_all
from unrolled.cells import (
    Cell,
    DescribedCell,
    GateLayout,
    GRUCell,
    LayerNormLSTMCell,
    LSTMCell,
    MinGRUCell,
    PeepholeLSTMCell,
    RNNCell,
    SLSTMCell,
    as_cell,
)
from unrolled.diagnosis.diagnose import diagnose
from unrolled.diagnosis.guard import guard
from unrolled.diagnosis.results import Diagnosis
from unrolled.drawing.draw import draw
from unrolled.errors import (
    CellError,
    ConfigError,
    DataError,
    DivergedError,
    GradientError,
    InputError,
    NonFiniteError,
    OptionError,
    RunError,
    StateError,
    UnrolledError,
)
from unrolled.generation.generate import Step, generate, stream
from unrolled.introspection.bias import TruncationBias
from unrolled.introspection.copies import Copies
from unrolled.introspection.layered import LayeredCopies, copies
from unrolled.introspection.single_copy import Copy
from unrolled.networks.bounded import plan_memory
from unrolled.networks.convert import from_torch, to_torch
from unrolled.networks.stack import Bidirectional, Stack, stack
from unrolled.networks.torch_layers import GRU, LSTM, RNN
from unrolled.networks.unroll import Unrolled, unroll
from unrolled.networks.windows import Window
from unrolled.verification import Check, Verification, verify
from unrolled.wrappers import (
    DropoutCell,
    FedState,
    ProjectedCell,
    ResidualCell,
    ScheduledSampling,
    SeededState,
    ZoneoutCell,
)

__version__ = "0.1.0"

# fmt: off
__all__ = [
    # cells
    "Cell", "RNNCell", "LSTMCell", "GRUCell", "PeepholeLSTMCell", "LayerNormLSTMCell", "MinGRUCell", "SLSTMCell",
    "as_cell", "DescribedCell", "GateLayout",
    # cells around cells
    "DropoutCell", "ZoneoutCell", "ResidualCell", "ProjectedCell", "ScheduledSampling", "FedState", "SeededState",
    # unrolled networks
    "unroll", "Unrolled", "stack", "Stack", "Bidirectional", "RNN", "LSTM", "GRU", "from_torch", "to_torch",
    # long horizons
    "Window", "Schedule", "segments", "revolve", "store_all", "plan_memory", "MemoryPlan",
    # a cell on its own outputs
    "generate", "stream", "Step",
    # batches of sequences that differ in length, and what is made of their outputs
    "BucketSampler", "collate_padded", "collate_packed", "last_output", "pooled", "sequence_loss",
    # the copies of one run
    "copies", "Copies", "LayeredCopies", "Copy", "TruncationBias",
    # every engine against the reference
    "verify", "Verification", "Check",
    # how a network trains
    "diagnose", "Diagnosis", "guard", "remedy",
    # pictures
    "draw",
    # errors
    "UnrolledError", "InputError", "StateError", "CellError", "OptionError", "GradientError", "ConfigError",
    "DataError", "DivergedError", "NonFiniteError", "RunError",
]
# fmt: on
