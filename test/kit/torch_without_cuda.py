"""A torch that is built for CUDA, without NVIDIA's libraries: stand-ins take their places, and none may be called.

DeepGEMM up to 0.1.5.post1 fits torch 2.11, which has no build for the CPU alone in the index of packages.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

# Not NVIDIA's: they are there.
_OTHERS = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|gomp|shm|torch\w*|c10\w*|caffe2\w*)\.so|ld-linux")
# What torch asks when it is imported. All else ends the process with its name.
_ANSWERS = {
    "cudaGetDeviceCount": "int {name}(int *count) {{ *count = 0; return 100; }}",
    "cudaGetLastError": "int {name}(void) {{ return 0; }}",
}
_REGISTERS = "void *{name}(void) {{ static char place[64]; return place; }}"
_ENDS = 'void {name}(void) {{ ended("{name}"); }}'
_HEAD = (
    "#include <stdio.h>\n#include <stdlib.h>\n"
    'static void ended(const char *name) { fprintf(stderr, "%s has no stand-in\\n", name); abort(); }\n'
)


def complete(torch: Path, *others: Path) -> None:
    """Put a stand-in beside torch's libraries for each of NVIDIA's that they need.

    Args:
        torch: the directory of the package.
        others: further libraries that need them.
    """
    libraries = torch / "lib"
    ours = [*(path for path in libraries.glob("*.so*") if not path.is_symlink()), *others]
    needed: dict[str, dict[str, set[str]]] = {}
    loose: set[str] = set()
    for path in ours:
        for name in re.findall(r"NEEDED.*\[(.+)\]", _read("readelf", "-d", path)):
            if not _OTHERS.match(name):
                needed.setdefault(name, defaultdict(set))
    for path in ours:
        owners = _owners(path)
        for line in _read("nm", "-D", "--undefined-only", path).splitlines():
            symbol, _, version = line.split()[-1].replace("@@", "@").partition("@")
            if (owner := owners.get(version)) in needed:
                needed[owner][version].add(symbol)
            elif not version and re.match(
                r"(nccl|nvshmem|cufft|curand|cusparse|cusolver|cudnn|cu[Ff]ile|cupti)", symbol
            ):
                loose.add(symbol)
    for number, (name, versions) in enumerate(sorted(needed.items())):
        if not (libraries / name).exists() and name != "libcuda.so.1":
            _compile(libraries / name, versions, loose if number == 0 else set())


def _owners(path: Path) -> dict[str, str]:
    """The library of each version of symbols that a library asks for."""
    owners, library = {}, ""
    for line in _read("readelf", "-VW", path).splitlines():
        if found := re.search(r"File: (\S+)", line):
            library = found[1]
        elif (found := re.search(r"Name: (\S+)\s+Flags", line)) and library:
            owners[found[1]] = library
    return owners


def _compile(path: Path, versions: dict[str, set[str]], loose: set[str]) -> None:
    names = sorted(loose.union(*versions.values()))
    source, script = path.with_suffix(".c"), path.with_suffix(".map")
    lines = (_ANSWERS.get(name, _REGISTERS if name.startswith("__cuda") else _ENDS).format(name=name) for name in names)
    source.write_text(_HEAD + "\n".join(lines) + "\n")
    command = ["cc", "-w", "-shared", "-fPIC", source, "-o", path, f"-Wl,-soname,{path.name}"]
    if versions:
        script.write_text(
            "".join(f"{name} {{ global: {'; '.join(sorted(each))}; }};\n" for name, each in versions.items())
        )
        command.append(f"-Wl,--version-script={script}")
    subprocess.run(command, check=True)
    source.unlink()
    script.unlink(missing_ok=True)


def _read(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
