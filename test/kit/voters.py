"""Ranks that vote, each a real process with a real store, and what may be odd about one of them.

In a module of its own: they are forked from a process that has no threads (kit.fork_server).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection

import torch.distributed
from sglang_warmstart.sglang import votes
from sglang_warmstart.sglang.votes import Votes

from kit.ports import free_ports

LIMIT_S = 1.0
ABSENT = -1

Part = Callable[[Votes, Sequence[int]], object]


def votes_at_once(ours: Votes, ranks: Sequence[int]) -> object:
    ours.join()
    return [ours.least(ranks, each, 2 + torch.distributed.get_rank(), ABSENT) for each in ("first", "second")]


def is_without_the_plugin(_ours: Votes, _ranks: Sequence[int]) -> object:
    time.sleep(LIMIT_S * 3)
    return None


def says_nothing(ours: Votes, _ranks: Sequence[int]) -> object:
    ours.join()
    time.sleep(LIMIT_S * 3)
    return None


def fails(ours: Votes, ranks: Sequence[int]) -> object:
    ours.join()
    ours.leave(ranks)
    return None


def comes_too_late(ours: Votes, ranks: Sequence[int]) -> object:
    ours.join()
    time.sleep(LIMIT_S * 2)
    return [ours.least(ranks, each, 1, ABSENT) for each in ("first", "second")]


def is_slow(ours: Votes, ranks: Sequence[int]) -> object:
    ours.join()
    time.sleep(LIMIT_S / 2)
    return [ours.least(ranks, each, 1, ABSENT) for each in ("first", "second")]


def takes_the_place_of_another(ours: Votes, ranks: Sequence[int]) -> object:
    Votes(ours.name).join()
    return votes_at_once(ours, ranks)


def _rank(part: Part, rank: int, size: int, port: int, connection: Connection) -> None:
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), world_size=size, rank=rank
    )
    votes.JOIN_S, votes.VOTE_S = LIMIT_S / 3, LIMIT_S
    start = time.monotonic()
    said = part(Votes("a matter"), range(size))
    connection.send((said, time.monotonic() - start))
    connection.recv()  # the first rank has the store


def run(*names: str) -> list[tuple[object, float]]:
    """What each rank came to, and its seconds.

    Args:
        names: of what each does, by its rank.
    """
    parts: list[Part] = [globals()[name] for name in names]
    (port,) = free_ports(1)
    fork = multiprocessing.get_context("fork")
    processes, connections = [], []
    for rank, part in enumerate(parts):
        here, there = fork.Pipe()
        processes.append(fork.Process(target=_rank, args=(part, rank, len(parts), port, there), daemon=True))
        processes[-1].start()
        connections.append(here)
    try:
        assert all(each.poll(30) for each in connections)
        return [each.recv() for each in connections]
    finally:
        for process in processes:
            process.kill()
            process.join()
