"""See whether Python code writes outside one directory, or runs a program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar


class TooSlow(BaseException):
    """An input took longer than it may. No handler of errors takes it for one of its own."""


class Watch:
    """What Python does to files outside one directory, by its audit events."""

    # Of an event's arguments, which are paths, and which the descriptor of the directory that each is relative to.
    _PATHS: ClassVar[dict[str, tuple[tuple[int, int | None], ...]]] = {
        "os.chmod": ((0, 2),),
        "os.chown": ((0, 3),),
        "os.link": ((0, 2), (1, 3)),
        "os.mkdir": ((0, 2),),
        "os.remove": ((0, 1),),
        "os.removexattr": ((0, None),),
        "os.rename": ((0, 2), (1, 3)),
        "os.rmdir": ((0, 1),),
        "os.setxattr": ((0, None),),
        "os.symlink": ((1, 2),),
        "os.truncate": ((0, None),),
        "os.utime": ((0, 3),),
    }
    # These are about what a link leads to; the others are about the link.
    _FOLLOWING = ("os.chmod", "os.chown", "os.removexattr", "os.setxattr", "os.truncate", "os.utime")
    _WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self) -> None:
        self._inside: str | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._see)

    @contextmanager
    def over(self, directory: Path) -> Iterator[None]:
        """Whatever is written meanwhile has to be below a directory."""
        self._inside = os.path.realpath(directory) + "/"
        try:
            yield
        finally:
            self._inside = None

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._inside is None:
            return
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            # A relative one may be relative to a descriptor, of which the event does not tell: the working directory,
            # which is empty, shows the others.
            if flags & self._WRITING and (isinstance(arguments[0], int) or os.fsdecode(arguments[0]).startswith("/")):
                self._check(event, arguments[0], follows=not flags & (os.O_EXCL | os.O_NOFOLLOW))
        elif event in self._PATHS:
            for path, directory in self._PATHS[event]:
                self._check(event, arguments[path], -1 if directory is None else arguments[directory])
            if event == "os.symlink":
                # What it leads to matters as well.
                self._check(event, os.path.join(os.path.dirname(arguments[1]), arguments[0]), arguments[2])  # noqa: PTH118, PTH120
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            self.outside.append(event)

    def _check(self, event: str, path: Any, directory: int = -1, follows: bool = False) -> None:
        if isinstance(path, int):
            return  # a descriptor: how it was opened has been seen
        name = os.fsdecode(path)
        if directory != -1:
            name = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)  # noqa: PTH115, PTH118
        if follows or event in self._FOLLOWING:
            found = os.path.realpath(name)
        else:
            found = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))  # noqa: PTH118, PTH119, PTH120
        if self._inside is None or not f"{found}/".startswith(self._inside):
            self.outside.append(f"{event} {found}")
