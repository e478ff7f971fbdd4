"""One model instance: continuous batching over unmodified transformers models. Knows no Dask."""
