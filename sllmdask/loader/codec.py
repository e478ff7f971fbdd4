"""Codec "split16": 16-bit floating-point numbers in fewer bytes, without loss, decoded faster than a disk reads.

Weights use few of the exponents that their dtype has, and a few of those for nearly all: about 2.6 bits hold what bfloat16
spends 8 on. Sign and mantissa are as good as random and stay as they are. bfloat16 comes down to about two thirds, float16 to
six sevenths. Other data of an even number of bytes is allowed as well; where it would not shrink, there is no encoding of it.

Each number is rotated left by one bit, so that its sign comes last. Its high byte then holds the *symbol*, which is coded: the
upper 8 bits for bfloat16 (the exponent), the upper 5 for float16 (the exponent; the lower 3 are *kept*). The low byte is stored
as it is. In each block the symbols are ranked, the most frequent first:

========  ==============  ==================  =================
rank      first code      second code         third code
========  ==============  ==================  =================
0 to 2    rank (2 bits)
3 to 5    3               rank - 3 (2 bits)
6 to 13   3               3                   rank - 6 (3 bits)
========  ==============  ==================  =================

All first codes of a block lie together, and so do its second and its third codes: so 16 numbers are decoded at a time, by bit
deposits and one table look-up, without a branch. Numbers of any other symbol are *exceptions*: coded as rank 0, mended at last.

Format
------
All integers are little-endian and unsigned. Bits fill each byte from its lowest bit on; what is left of a part's last byte is 0.
Nothing is aligned or padded but for that.

======  ======  ================================================================================================
offset  bytes   header
======  ======  ================================================================================================
0       4       ``SP16``
4       1       version, 1
5       1       b: a block holds ``2**b`` numbers, the last one what is left; 4 to 16
6       2       0
8       4       N: how many numbers there are
12      4       bytes of the whole, header included
16              blocks of the first ``N - N % 16`` numbers, in order
        2 each  the last ``N % 16`` numbers as they are
======  ======  ================================================================================================

Each block of n numbers, a multiple of 16:

======  ======  ================================================================================================
offset  bytes   block
======  ======  ================================================================================================
0       4       kind: 0 raw, 1 symbols of 8 bits, 2 symbols of 5 bits
4       4       n2: how many second codes there are
8       4       n3: how many third codes there are
12      4       e: how many exceptions there are
16      14      the symbols by rank, those of kind 2 in the lower 5 bits; ranks without one: any that can be a symbol
30      2       0
======  ======  ================================================================================================

The header of a raw block is zeros to its end, and its 2 * n bytes follow as they are. In the others there follow:

=======================  =======================================================================================
bytes                    part
=======================  =======================================================================================
n / 4                    first codes
ceil(n2 / 4)             second codes
ceil(3 * n3 / 8)         third codes
0; kind 2: 3 * n / 8     the kept bits, 3 for each number
2 * e                    exceptions: their positions in the block
e                        exceptions: their symbols
n                        low bytes
=======================  =======================================================================================

Decoding checks that the codes are as many as the header says, and that no part ends and no exception lies elsewhere; it is not
a checksum: other bytes than the encoder's may decode to other numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sllmdask.loader import kernels

#: Numbers of a block, as a power of two: the larger, the fewer headers; the smaller, the closer its table fits. At 2**14 a header
#: is 0.1 % of its block.
LOG2_BLOCK = 14


def encode_split16(source: NDArray[np.uint8]) -> bytes | None:
    """`source`, shape (nbytes,), contiguous, as data of this codec; ``None`` where that is no smaller.

    Raises :class:`ValueError` for an odd number of bytes or for 4 GiB and more.
    """
    if source.nbytes % 2 or source.nbytes >= 2**32:
        raise ValueError(f"split16 encodes an even number of bytes below 4 GiB, not {source.nbytes}")
    if source.dtype != np.uint8 or not source.flags.c_contiguous:
        raise ValueError("split16 encodes contiguous bytes")
    n_numbers = source.nbytes // 2
    target = np.empty(kernels.split16_bound(n_numbers, LOG2_BLOCK), np.uint8)
    nbytes = kernels.split16_encode(source.ctypes.data, n_numbers, target.ctypes.data, LOG2_BLOCK)
    return target[:nbytes].tobytes() if nbytes < source.nbytes else None


def decode_split16(source_address: int, source_nbytes: int, target_address: int, target_nbytes: int) -> None:
    """Decode `source_nbytes` of this codec's data to exactly `target_nbytes`; neither address need be aligned.

    Raises :class:`ValueError` with the reason where the source is no such data, and may leave anything in the target then.
    Whatever the source holds, nothing outside of source and target is read or written; they may not overlap.
    """
    fault = kernels.split16_decode(source_address, source_nbytes, target_address, target_nbytes)
    if fault:
        raise ValueError(f"not valid as split16: {kernels.FAULTS[fault]}")
