"""The compiler that DeepGEMM runs in a watched process: it runs the real one, and reports that.

It is a program of its own, started once per compiled kernel by the command that :mod:`.deep_gemm_watch` writes. It
imports nothing of this package and little else, so that it starts in milliseconds.

Arguments: SOCKET READY REFUSE COMPILER, then what DeepGEMM passes to its compiler.
SOCKET gets a JSON object before and after each run. A kernel of a server with a service gets a file beside it (see
:mod:`sglang_warmstart.deepgemm.further`). If REFUSE is "1" and the file READY exists, or its directory is gone, the
program runs no compiler and fails. That makes the call of DeepGEMM fail.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress

# What is not said within this is lost, and the kernel is compiled all the same.
SPEAK_LIMIT_S = 1.0
# The variable of a rank that names its service.
SERVICE = "SGLANG_WARMSTART_SERVICE"


def main() -> int:
    path, ready, refuse, *command = sys.argv[1:]
    source = command[1] if len(command) > 1 else ""
    speaker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    # Where nobody reads, the queue fills and sending waits: so if DeepGEMM held Python's lock while it waits for this.
    speaker.settimeout(SPEAK_LIMIT_S)

    def say(**words: object) -> None:
        with suppress(OSError):  # nobody listens any more: the kernel is compiled all the same
            speaker.sendto(json.dumps({"run": os.getpid(), **words}).encode(), path)

    at = time.monotonic()
    # The run of a server that has been up for long may have been removed, and the file with it.
    serving = os.access(ready, os.F_OK) or not os.access(os.path.dirname(ready), os.F_OK)  # noqa: PTH120
    if refuse == "1" and serving:
        # Whoever listens looks at the source and at the call that waits. Both are gone once this has ended.
        answer = f"{path}.{os.getpid()}"
        with suppress(OSError):
            speaker.bind(answer)
            say(begins=source)
            speaker.recv(1)
        with suppress(OSError):
            os.unlink(answer)  # noqa: PTH108 (pathlib takes longer to import than all else here)
        say(refused=True, at=at, seconds=0.0, status=0)
        print("refused: SGLANG_WARMSTART_JIT_MONITOR=error, and the server is serving", file=sys.stderr)
        return 1
    say(begins=source)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(os.posix_spawnp(command[0], command, os.environ), 0)[1])
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        status = 127
    if status == 0:
        leave_flags(command, os.environ.get(SERVICE))
    say(at=at, seconds=time.monotonic() - at, status=status)
    return 1 if status < 0 else status


def leave_flags(command: list[str], service: str | None) -> None:
    """Say beside a kernel what it was compiled with: COMPILER SOURCE, two options, CUBIN, and then the flags."""
    if service and len(command) > 5:
        with suppress(OSError), open(f"{command[4]}.flags", "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(f"{' '.join(command[5:])}\n{service}\n")


if __name__ == "__main__":
    sys.exit(main())
