"""Dask actors that hold models, typed handles to them, and the token streams between workers and front doors."""
