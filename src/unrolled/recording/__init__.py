"""Recording: a cell's step becomes a program.

A cell is run on real tensors at two batch sizes while a tape notes every operation below autograd (`tape`); its
`torch.autograd.Function`s become single operations with a backward of their own (`functions`), and the two recordings
one `program` for every batch size (`merge`, `record`). In comes a cell with arguments for a step; out comes a
`Recording`, free of tensors, which `interpret` runs by torch operations. `guards` say when a recording still holds.
"""
