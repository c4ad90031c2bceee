"""How a network trains: what of one forward and backward pass can be measured, and what it means.

In come the copies of a run (see `introspection`); out come figures, plain numbers without tensors, with a verdict and
remedies, or for a training under `guard` the operation that made the first number that is not finite. Nothing is drawn.
"""
