"""XXH64 in plain Python, to compare with. Source: Yann Collet, doc/xxhash_spec.md."""

from __future__ import annotations


def xxh64_by_the_book(data: bytes) -> int:
    """The specification's steps, one by one, on Python's integers."""
    mask = 2**64 - 1
    p1, p2, p3 = 11400714785074694791, 14029467366897019727, 1609587929392839161
    p4, p5 = 9650029242287828579, 2870177450012600261

    def rotate(x: int, n: int) -> int:
        return ((x << n) | (x >> (64 - n))) & mask

    def a_round(lane: int, word: int) -> int:
        return rotate((lane + word * p2) & mask, 31) * p1 & mask

    if len(data) >= 32:
        lanes = [(p1 + p2) & mask, p2, 0, -p1 & mask]
        stripes = len(data) // 32
        for start in range(0, 32 * stripes, 8):
            lane = start // 8 % 4
            lanes[lane] = a_round(lanes[lane], int.from_bytes(data[start : start + 8], "little"))
        result = sum(rotate(lane, n) for lane, n in zip(lanes, (1, 7, 12, 18), strict=True)) & mask
        for lane in lanes:
            result = ((result ^ a_round(0, lane)) * p1 + p4) & mask
        rest = data[32 * stripes :]
    else:
        result, rest = p5, data
    result = (result + len(data)) & mask
    while len(rest) >= 8:
        result = (rotate(result ^ a_round(0, int.from_bytes(rest[:8], "little")), 27) * p1 + p4) & mask
        rest = rest[8:]
    if len(rest) >= 4:
        result = (rotate(result ^ (int.from_bytes(rest[:4], "little") * p1 & mask), 23) * p2 + p3) & mask
        rest = rest[4:]
    for byte in rest:
        result = rotate(result ^ (byte * p5 & mask), 11) * p1 & mask
    result = (result ^ (result >> 33)) * p2 & mask
    result = (result ^ (result >> 29)) * p3 & mask
    return result ^ (result >> 32)
