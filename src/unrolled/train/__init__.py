"""The main job: a character language model trained by backpropagation through time."""
