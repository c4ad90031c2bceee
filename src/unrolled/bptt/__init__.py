"""What becomes of gradients: how far they flow back, and what is stored or computed again for them.

In comes a `SequenceRun`, which knows how to run any segment of itself, by whichever engine, and either a truncation
(horizon and stride), a schedule, or a memory budget that a schedule is planned for. Out come the outputs and the last
state, under an autograd Function that goes back through the segments one by one.
"""
