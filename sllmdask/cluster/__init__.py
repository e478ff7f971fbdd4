"""The Dask side: scheduler plugin, worker plugin, effects, gateway, and how a cluster is put together."""
