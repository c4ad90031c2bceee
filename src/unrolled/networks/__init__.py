"""What a user calls: cells unrolled over sequences, in layers and directions, as torch.nn's layers, window by window.

A caller's inputs, state, lengths, resets and context come in. At the front door (`base.Network.forward`) they become
one `layout.Call`, in the order of rows and steps that engines take, and are passed down to each unrolled cell; out go
outputs and states in the caller's own layout. How a cell's copies run is decided below: by a plan or the reference in
`engine`, within a horizon or a memory budget in `bptt`, as one operator of somebody else's program in `tracing`. Other
rooms take `Call.of`, `base.first_state`, `layered.run_parts`, and for torch.nn's layers `torch_layers.network_call`.
"""
