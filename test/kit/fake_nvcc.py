"""A compiler that is called as nvcc is, takes no time, and can be told to misbehave."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from sglang_warmstart.deepgemm import stub

from kit.scripted_compiler import write_compiler

# An ELF-64 header without tables: all that the publisher looks at.
_ELF = b"\x7fELF\x02\x01\x01" + bytes(57)

# With a child of its own, as nvcc has some.
HANG = "sleep 1000 & wait"

_BODY = """
if grep -q {mark} "$source"; then
  echo stub >> {runs}
else
  head -n 1 "$source" >> {runs}
  . {on_kernel}
fi
shift 4
{{ cat {elf} "$source"; printf '\\n%s' "$*"; }} > "$cubin"
"""


class FakeNvcc:
    """A compiler whose cubins are an ELF header, the source and the flags: it can be seen what they were made from.

    Args:
        directory: of the compiler alone.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.path = directory / "nvcc"
        self._runs, self._on_kernel = directory / "runs", directory / "on_kernel"
        (directory / "elf").write_bytes(_ELF)
        self.on_each_kernel(":")
        paths = {name: shlex.quote(str(directory / name)) for name in ("runs", "on_kernel", "elf")}
        write_compiler(directory, _BODY.format(mark=stub.MARK.decode(), **paths))

    def on_each_kernel(self, command: str) -> None:
        """Run a line of shell for each kernel before it is compiled; it knows ``$source``. A stub is no kernel."""
        fresh = self._on_kernel.with_name("fresh")
        fresh.write_text(command + "\n", encoding="utf-8")
        fresh.replace(self._on_kernel)

    @property
    def runs(self) -> Counter[str]:
        """How often it compiled what, by the first line of the source, or "stub"."""
        return Counter(self._runs.read_text(encoding="utf-8").splitlines() if self._runs.exists() else ())

    @property
    def compiled(self) -> Counter[str]:
        """The same without stubs."""
        return Counter({what: count for what, count in self.runs.items() if what != "stub"})


def cubin_of(source: str, flags: str) -> bytes:
    """What the compiler leaves for a source."""
    return _ELF + source.encode() + b"\n" + flags.encode()
