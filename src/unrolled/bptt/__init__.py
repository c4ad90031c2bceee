"""Backpropagation through time: stages over a segment of copies, and the autograd glue that runs them."""
