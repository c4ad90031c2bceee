"""The copies of an unrolled network as objects, and how the gradients that flow through them are read.

In comes a network and what it is called with. One run by the reference engine is recorded, with a tap on autograd's
graph before and after every copy; out come `Copies` (for several layers or directions `LayeredCopies`), which know each
copy's input, state and output, and after a backward pass its gradients and its share of every weight's gradient.
"""
