"""Runs as servers leave them, written by the product's own writer: what a report is made of, without a server."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from sglang_warmstart.base.events import Event, EventLog, Process

# CLOCK_MONOTONIC of a host that has been up for a while, and its time since 1970 at 0.
CLOCK = 43_200.0
EPOCH = 1_789_000_000.0

TARGETS = (
    "fp8_gemm_nt n=2112 k=7168",
    "fp8_gemm_nt n=24576 k=1536",
    "fp8_gemm_nt n=7168 k=16384",
    "fp8_gemm_nt n=4096 k=7168",
    "fp8_gemm_nt n=7168 k=2048",
    "m_grouped_fp8_gemm_nt_contiguous n=4096 k=7168 groups=256",
    "m_grouped_fp8_gemm_nt_masked n=4096 k=7168 groups=256",
    "m_grouped_fp8_gemm_nt_masked n=7168 k=2048 groups=256",
)
TRITON = (
    "_fwd_kernel_stage1", "_fwd_grouped_kernel_stage1", "_fwd_kernel_stage2", "write_req_to_token_pool_triton",
    "_per_token_group_quant_fp8", "fused_moe_kernel", "create_flashinfer_kv_indices_triton", "compute_position_kernel",
)  # fmt: skip
SHAPE = "x: *bf16, y: *fp8e4nv, rows: i32; BLOCK=128, num_warps=4, num_stages=2"
REMEDY = (
    "a forward of this shape before the server is ready would have (SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP runs larger "
    "ones), or Triton's cache out of a bundle (bundle pack --include triton)"
)


def write_process(directory: Path, role: str, pid: int, started: float, events: Iterable[Event], **labels: str) -> None:
    """One process of a run.

    Args:
        started: in seconds since the run's beginning, as are the times of the events.
    """
    process = Process(
        role=role, pid=pid, host="gpu-node-7", boot="a-boot", started=CLOCK + started, epoch=EPOCH, labels=labels
    )
    log = EventLog(directory, process)
    for event in events:
        values = {name: getattr(event, name) for name in event.__struct_fields__}
        log.emit(Event(**(values | {"at": CLOCK + event.at})))
    log.close()


def step(name: str, begin: float, end: float) -> Event:
    """A step of SGLang's start-up."""
    return Event(kind="step", name=name, at=begin, seconds=end - begin)


def write_exact(directory: Path, serving: bool = False, workers: int = 4, kernels: int = 39) -> Path:
    """A start with exact warm-up and cold caches: four workers compile, while two ranks wait for them.

    Args:
        serving: whether a kernel is compiled after it was ready.
    """
    numbers = random.Random(7)
    compiles, free, targets = [], [31.4] * workers, list(TARGETS)
    for number in range(kernels):
        worker = min(range(workers), key=lambda each: free[each])
        seconds = numbers.uniform(2.6, 5.2)
        compiles.append(
            Event(
                kind="compile",
                name=f"sm90_fp8_gemm_1d2d.{numbers.randrange(16**8):08x}",
                at=free[worker],
                seconds=seconds,
                library="deep-gemm",
                lane=f"worker {worker + 1}",
                target=targets[number % len(targets)],
            )
        )
        free[worker] += seconds
    compiled = max(free)
    records = [
        Event(kind="record", name=name, at=31.0 + number * 0.3, seconds=0.28, library="deep-gemm", lane="recorder 1",
              kernels=kernels // len(TARGETS))
        for number, name in enumerate(TARGETS)
    ]  # fmt: skip
    cached = [
        Event(kind="compile", name=f"sm90_fp8_gemm_1d2d.{number:08x}", at=31.2, library="deep-gemm", target=TARGETS[0],
              cached=True)
        for number in range(3)
    ]  # fmt: skip
    stub = Event(kind="compile", name="the stub", at=29.2, seconds=1.7, library="deep-gemm", lane="stub")
    ready = compiled + 10.2
    slower = 0.4
    for rank in range(2):
        late = rank * slower
        loads = [
            Event(kind="load", name=TRITON[number % len(TRITON)], at=compiled + 1.1 + late + number * 0.003,
                  seconds=0.0021, library="triton", cached=True, shape=SHAPE)
            for number in range(240)
        ]  # fmt: skip
        jit = Event(kind="jit", name="fused_moe_kernel", at=compiled + 2.1 + late, seconds=1.3, library="triton",
                    shape=SHAPE, remedy=REMEDY)  # fmt: skip
        events = [
            step("imports", 6.4, 17.1 + late),
            step("scheduler", 17.1 + late, compiled + 7.9 + late),
            step("distributed", 17.4 + late, 20.2),
            step("load weights", 20.2, 29.0 + late),
            step("memory pool", 29.0 + late, 29.3 + late),
            step("attention backend", 29.3 + late, 29.9 + late),
            step("kernel warm-up", 30.0 + late, compiled + 4.0 + late),
            Event(kind="discover", name="dry forwards", at=30.0 + late, seconds=0.9, library="deep-gemm",
                  kernels=len(TARGETS)),
            step("wait for kernels", 31.0 + late, compiled + 0.2 + late),
            Event(kind="load", name=f"{len(TARGETS)} targets", at=compiled + 0.2 + late, seconds=0.7,
                  library="deep-gemm", kernels=102),
            *loads,
            jit,
            step("CUDA graphs", compiled + 4.1 + late, compiled + 7.6 + late),
        ]  # fmt: skip
        if serving and rank == 1:
            events.append(
                Event(kind="jit", name="_fwd_grouped_kernel_stage1", at=ready + 4.2, seconds=0.84, library="triton",
                      phase="serving", shape=SHAPE, remedy=REMEDY)
            )  # fmt: skip
        write_process(directory, "rank", 4100 + rank, 6.4, events, pp_rank=str(rank), tp_rank="0")
    write_process(
        directory,
        "main",
        4001,
        0.0,
        [
            step("imports", 0.0, 6.2),
            step("launch", 6.2, 6.5),
            step("server warm-up", compiled + 8.4, ready),
            Event(kind="ready", name="server", at=ready),
        ],
    )
    write_process(directory, "service", 4200, 17.6, [stub, *records, *cached, *compiles])
    write_process(
        directory,
        "restore",
        4300,
        6.9,
        [Event(kind="restore", name="bundle.tar.zst", at=7.4, seconds=2.3, library="deep-gemm", kernels=12)],
    )
    return directory


def write_stock(directory: Path) -> Path:
    """A start without exact warm-up: each rank compiles what it calls, when it calls it."""
    numbers = random.Random(11)
    ends = []
    for rank in range(2):
        late, at = rank * 1.9, 30.1
        jits = []
        for number in range(39):
            seconds = numbers.uniform(2.2, 4.4)
            jits.append(
                Event(kind="jit", name=f"sm90_fp8_gemm_1d2d_impl<{TARGETS[number % 8].split()[1]}, {number}>",
                      at=at + late, seconds=seconds, library="deep-gemm",
                      shape=f"gemm_nt_f8f8bf16(lhs: ({2**(number % 12)}, 7168))",
                      remedy="exact warm-up would have; `sglang-warmstart doctor` says why it is not at work")
            )  # fmt: skip
            at += seconds + 0.2
        end = at + late
        ends.append(end)
        events = [
            step("imports", 6.4, 17.1 + late),
            step("scheduler", 17.1 + late, end + 4.6),
            step("distributed", 17.4 + late, 20.4),
            step("load weights", 20.4, 29.0 + late),
            step("memory pool", 29.0 + late, 29.3 + late),
            step("attention backend", 29.3 + late, 29.9 + late),
            step("kernel warm-up", 30.0 + late, end + 0.2),
            *jits,
            step("CUDA graphs", end + 0.4, end + 4.2),
        ]
        write_process(directory, "rank", 5100 + rank, 6.4, events, pp_rank=str(rank), tp_rank="0")
    ready = max(ends) + 7.0
    write_process(
        directory,
        "main",
        5001,
        0.0,
        [
            step("imports", 0.0, 6.2),
            step("launch", 6.2, 6.5),
            step("server warm-up", ready - 1.9, ready),
            Event(kind="ready", name="server", at=ready),
        ],
    )
    return directory


def write_large(directory: Path, events: int = 10_000) -> Path:
    """A start with very many kernels: 64 workers, and as many loads again in eight ranks."""
    numbers = random.Random(13)
    half = events // 2
    free = [30.0] * 64
    compiles = []
    for number in range(half):
        worker = min(range(64), key=lambda each: free[each])
        seconds = numbers.uniform(1.0, 4.0)
        compiles.append(
            Event(kind="compile", name=f"sm90_m_grouped_fp8_gemm_nt_masked_1d2d.{numbers.randrange(16**8):08x}",
                  at=free[worker], seconds=seconds, library="deep-gemm", lane=f"worker {worker + 1}",
                  target=TARGETS[number % len(TARGETS)])
        )  # fmt: skip
        free[worker] += seconds
    compiled = max(free)
    for rank in range(8):
        loads = [
            Event(kind="load", name=TRITON[number % 8], at=compiled + 1 + number * 0.004, seconds=0.003,
                  library="triton", cached=True, shape=SHAPE)
            for number in range(half // 8)
        ]  # fmt: skip
        write_process(
            directory,
            "rank",
            6100 + rank,
            6.4,
            [
                step("imports", 6.4, 17.0),
                step("scheduler", 17.0, compiled + 8),
                step("load weights", 18.0, 29.0),
                step("kernel warm-up", 29.5, compiled + 5),
                step("wait for kernels", 30.0, compiled + 0.5),
                *loads,
            ],
            tp_rank=str(rank),
        )
    write_process(
        directory, "main", 6001, 0.0, [step("imports", 0, 6.2), Event(kind="ready", name="server", at=compiled + 9.5)]
    )
    write_process(directory, "service", 6200, 17.0, compiles)
    return directory


HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">\u2028\u2029<!--<script>'\"&amp;\x1b[31m"


def write_hostile(directory: Path) -> Path:
    """A run whose every text is an attack on the page."""
    event = Event(
        kind="jit", name=HOSTILE, at=2.0, seconds=1.0, phase="serving", library=HOSTILE, shape=HOSTILE, target=HOSTILE,
        error=HOSTILE, remedy=HOSTILE,
    )  # fmt: skip
    lane = Event(kind="compile", name=HOSTILE, at=0.5, seconds=0.4, library=HOSTILE, lane=HOSTILE, target=HOSTILE)
    write_process(directory, "main", 1, 0.0, [step(HOSTILE, 0.1, 0.9), Event(kind="ready", name=HOSTILE, at=1.5)])
    write_process(directory, "rank", 2, 0.1, [step("scheduler", 0.2, 1.4), event], tp_rank=HOSTILE)
    write_process(directory, "service", 3, 0.1, [lane])
    return directory
