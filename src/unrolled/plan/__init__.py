"""Plans: how a sequence will be run, found by analysis of a recorded step.

In comes a cell with arguments for a step; it is recorded, its operations are proved to act row by row (`rows`),
partitioned by where in a sequence they run (`partition`), and fused into compiled loops where that is cheaper (`fuse`).
Every loop is cut out as a program of its own (`loops`), with its step backward, which is recorded and partitioned
likewise (`backward`). Out comes a frozen `StepPlan` without tensors; `report` says it to a person.
"""
