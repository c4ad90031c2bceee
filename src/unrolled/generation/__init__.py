"""A cell on its own outputs: free running until each row has come to its end, as a whole or step by step.

In come a cell, a state and a first input; out come outputs, lengths and last states, or one `Step` after the other.
"""
