"""Kernels that are compiled where they run."""
