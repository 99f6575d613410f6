"""Pipelines whose processes are started by Ray instead of torchrun."""
