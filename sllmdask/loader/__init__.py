"""From checkpoint files to tensors in memory, at the speed of the disk. Usable without Dask."""
