"""Running a plan: a partitioned step over a segment of copies, stage by stage, on whichever engine runs the loops.

In come a `StepPlan`, the cell whose tensors it reads, the tensors of a segment, and a `LoopRunner`, which is all that
an engine has to be. Random numbers are drawn ahead of the loops (`draws`); what the steps asked of their numbers is
looked at when all have run (`answers`). Out come the outputs and the last state, under autograd: outside of loops by
ordinary operations on all copies at once, and through loops by an autograd Function that runs the step backward as a
loop too.
"""
