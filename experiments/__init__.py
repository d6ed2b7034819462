"""Experiments on the library: tasks, the training loop, methods and reports."""
