"""Glue for other libraries: a module here imports its own, and nothing else here does."""
