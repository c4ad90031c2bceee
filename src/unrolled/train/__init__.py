"""The command's jobs: a character language model trained by backpropagation through time, and what is done with it.

In come flags, a config file and a text; out comes a run directory with the config, the metrics, the model and a page.
The other jobs read such a directory: they sample from the model, plan its memory, verify, diagnose and draw it.
"""
