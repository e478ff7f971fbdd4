"""What the cluster decides. Plain Python: events in, decisions out; no I/O, no clock, no Dask, no torch, no log line."""
