"""A cache is found again where a bundle restores it: Triton itself, and ninja with commands like FlashInfer's.

The other libraries, and other places: test/soak/libraries.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from kit.restored_cache import needs_ninja, restore, triton_finds_what_is_restored, write
from sglang_warmstart.libraries.table import LIBRARIES

THEN = 1_700_000_000_000_000_000


def test_triton_finds_what_is_restored_where_it_was(tmp_path: Path) -> None:
    triton_finds_what_is_restored(tmp_path, moved=False)


# FlashInfer's commands are of this form; cp stands for the compilers.
_NINJA = """
ninja_required_version = 1.3
rule cuda_compile
  command = cp $in $out && echo "$out: $in {header}" > $out.d {flag}
  depfile = $out.d
  deps = gcc
rule link
  command = cp $in $out
build {op}/op.cuda.o: cuda_compile {source}
build {op}/op.so: link {op}/op.cuda.o
default {op}/op.so
"""

_CHANGES = {
    "nothing": False,
    "build.ninja is newer": False,
    "the header is older": False,
    "the times are those of unpacking": True,
    "the header is newer": True,
    "the source is newer": True,
    "a flag is another": True,
    ".ninja_log is missing": True,
    ".ninja_deps is missing": True,
    "op.cuda.o is missing": True,
}


@needs_ninja
@pytest.mark.parametrize("change", _CHANGES)
def test_ninja_compiles_flashinfers_kernel_again_only_if(change: str, tmp_path: Path, flashinfer: Path) -> None:
    library, environment = LIBRARIES["flashinfer"], {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    root, header = library.root(environment), flashinfer / "data" / "include" / "a.h"
    assert root is not None
    op, source = root / "90a" / "cached_ops" / "op", root / "90a" / "generated" / "op" / "op.cu"
    write(root, ["90a/generated/op/op.cu", "90a/cached_ops/op/build.ninja", "90a/cached_ops/tmp/op.lock"])
    for path in (source, header):
        os.utime(path, ns=(THEN, THEN))

    def write_ninja(flag: str = "") -> None:
        (op / "build.ninja").write_text(_NINJA.format(op=op, source=source, header=header, flag=flag))

    def compiles() -> bool:
        command = ["ninja", "-v", "-C", str(op), "-f", str(op / "build.ninja")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert ("no work to do" in said) != ("cp " in said)
        return "cp " in said

    write_ninja()
    assert compiles()
    assert not compiles()
    restore(library, environment, tmp_path, root)
    match change:
        case "build.ninja is newer":
            os.utime(op / "build.ninja")
        case "the header is older":
            os.utime(header, (1, 1))
        case "the times are those of unpacking":
            time.sleep(0.01)
            for path in op.iterdir():
                os.utime(path)
        case "the header is newer":
            os.utime(header)
        case "the source is newer":
            os.utime(source)
        case "a flag is another":
            write_ninja("&& true")
        case _ if change.endswith(" is missing"):
            (op / change.split()[0]).unlink()
    assert compiles() is _CHANGES[change]
