"""Attention kernels over paged KV."""
