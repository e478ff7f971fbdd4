"""For ``bench_migration.py``: many streams at once, and moves of random ones at random times."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from typing import Any

from scripts.bench_engine_measure import first_difference
from scripts.bench_load_measure import BenchError
from scripts.bench_load_report import Progress
from scripts.bench_migration_cluster import Cluster, Stream, follow, open_session
from scripts.bench_migration_report import gap_facts

#: Tokens by which the speed of the streams is found, and the fewest and the most that an answer has.
N_PROBE, N_TOKENS = 40, (60, 7900)
#: Streams that are tried for one move.
N_TRIES = 5
#: Seconds within which all is as before, once the last stream has ended.
REST_S = 10.0


def plan(n_moves: int, seconds: float, n_streams: int, seed: int) -> list[tuple[float, int, str, float]]:
    """When, which stream, in which way, and a number from 0 to 1 that chooses the destination."""
    rng = random.Random(f"storm {seed}")
    at = sorted(rng.uniform(0, seconds) for _ in range(n_moves))
    return [(when, rng.randrange(n_streams), rng.choice(("kv", "tokens")), rng.random()) for when in at]


async def storm(args: argparse.Namespace, several: Cluster, progress: Progress) -> dict[str, Any]:
    """The same streams undisturbed, then with moves: what differs, and the gaps of both."""
    rng = random.Random(f"{args.seed} storm")
    prompts = [[rng.randrange(500) for _ in range(rng.randint(8, 120))] for _ in range(args.streams)]
    before = several.usage()
    progress.stage(f"storm: {args.streams} streams on {len(several.nodes)} workers")
    probe = await play(several, prompts, N_PROBE, "probe")
    seconds = max(stream.at[-1] for stream in probe) - min(stream.at[0] for stream in probe)
    # The storm is to be over before the streams are.
    n_tokens = min(max(round(1.1 * args.seconds * N_PROBE / seconds), N_TOKENS[0]), N_TOKENS[1])
    storm_s = min(args.seconds, n_tokens * seconds / N_PROBE / 1.1)
    progress.say(f"storm: {n_tokens} tokens each, undisturbed")
    quiet = await play(several, prompts, n_tokens, "quiet")
    progress.say(f"storm: {n_tokens} tokens each, {args.moves} moves in {storm_s:.0f} s")
    replies: list[dict[str, Any]] = []
    planned = plan(args.moves, storm_s, args.streams, args.seed)
    moving = asyncio.create_task(move_all(several, planned, args.streams, replies))
    moved = await play(several, prompts, n_tokens, "moved")
    await moving
    outcomes = Counter(reply["outcome"] for reply in replies)
    pauses = [reply["pause_ms"] for reply in replies if reply.get("pause_ms") is not None]
    return {
        "n_workers": len(several.nodes),
        "n_streams": args.streams,
        "n_tokens": n_tokens,
        "seconds": storm_s,
        "outcomes": dict(outcomes),
        "by_way": dict(Counter(reply["way"] for reply in replies if reply["outcome"] == "moved")),
        "reasons": dict(Counter(reply["reason"] for reply in replies if reply["outcome"] in ("stayed", "refused"))),
        "n_failed": sum(bool(stream.error) or stream.reason != "length" for stream in moved),
        "n_other_tokens": sum(
            first_difference(after.ids, stayed.ids) is not None for after, stayed in zip(moved, quiet, strict=True)
        ),
        "quiet": gap_facts([gap for stream in quiet for gap in stream.gaps_ms]),
        "moving": gap_facts([gap for stream in moved for gap in stream.gaps_ms]),
        "pauses": gap_facts(pauses) if pauses else None,
        "wall_s": {"quiet": wall_s(quiet), "moving": wall_s(moved)},
        "held_before": before,
        "held_after": await at_rest(several, before),
    }


def wall_s(streams: list[Stream]) -> float:
    return max(stream.at[-1] for stream in streams) - min(stream.at[0] for stream in streams)


async def play(several: Cluster, prompts: list[list[int]], n_tokens: int, name: str) -> list[Stream]:
    """All of them at a time, to their ends; each is asked for once."""
    streams = [Stream(f"{name}-{number}", prompt) for number, prompt in enumerate(prompts)]
    async with open_session(several.url) as session:
        await asyncio.gather(*(follow(session, stream, n_tokens) for stream in streams))
    if name != "moved" and (failed := [stream.error or stream.reason for stream in streams if len(stream.ids) != n_tokens]):
        raise BenchError(f"a stream that nobody disturbed ended: {failed[0]}")
    return streams


async def move_all(
    several: Cluster, planned: list[tuple[float, int, str, float]], n_streams: int, replies: list[dict[str, Any]]
) -> None:
    """As an operator does, by the name of the request. Where one cannot move, for it is moving already, the next one does."""
    async with open_session(several.url) as session:
        began_at = time.monotonic()

        async def one(number: int, way: str, choice: float) -> None:
            async with session.get("/admin/requests") as response:
                nodes = {row["id"]: row["node"] for row in (await response.json())["requests"]}
            for again in range(N_TRIES):
                request = f"moved-{(number + again) % n_streams}"
                others = [node for node in several.nodes if node != nodes.get(request)]
                to = others[int(choice * len(others))]
                async with session.post("/admin/migrate", json={"request": request, "to": to, "kind": way}) as response:
                    reply = await response.json()
                if response.status == 200:
                    [record] = reply["moves"]
                    break
                record = {"outcome": "refused", "reason": reply["error"]["message"]}
            replies.append({**record, "way": way, "request": request})

        tasks = []
        for at, number, way, choice in planned:
            await asyncio.sleep(max(0.0, began_at + at - time.monotonic()))
            tasks.append(asyncio.create_task(one(number, way, choice)))
        await asyncio.gather(*tasks)
        # What its client waited is known when the next token is there.
        async with session.get("/admin/requests") as response:
            rows = {row["id"]: row["moves"] for row in (await response.json())["requests"]}
        for reply in replies:
            for done in rows.get(reply["request"], []):
                if done["epoch"] == reply.get("epoch"):
                    reply["pause_ms"] = done["pause_ms"]


async def at_rest(several: Cluster, before: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + REST_S
    while True:
        after = await asyncio.to_thread(several.usage)
        if after == before or time.monotonic() > deadline:
            return after
        await asyncio.sleep(0.2)
