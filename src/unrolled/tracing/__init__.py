"""A network inside of somebody else's program: `torch.compile`, `torch.export`, `torch.vmap`.

A network that is being traced comes in, with tensors that may have no numbers; what goes out is one call of the
operator `unrolled::run`, or nothing where there is no plan: then the trace breaks there, and the call is made outside
of it. A `Site` is the place of that call: it knows the plan, and so what the trace must know beforehand.
"""
