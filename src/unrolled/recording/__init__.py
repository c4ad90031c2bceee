"""Recording: a cell's step becomes a program.

A cell is run on real tensors at two batch sizes while a tape notes every operation below autograd (`tape`). What it
calls of torch is put into a form that can be noted (`indexing`, `fused_layers`), and its numbers stay unread
(`unread`). Writes in place become what they return (`memory`), random numbers and questions are noted as such (`draws`,
`checks`), each `torch.autograd.Function` becomes one operation with a backward of its own (`functions`), and the two
recordings one `program` for every batch size (`merge`, `record`). In comes a cell with arguments for a step; out comes
a `Recording`, free of tensors, which `interpret` runs by torch operations and whose tensors are found anew at every
call (`externals`). `guards` say when it still holds; by recordings `stateful` proves where modules keep their state.
"""
