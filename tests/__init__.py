import os
from pathlib import Path

# Without a GPU, Triton kernels run in its interpreter. Triton decides when it is imported, which transformers does if it can.
if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
