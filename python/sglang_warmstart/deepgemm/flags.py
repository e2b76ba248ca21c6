"""The options of nvcc that DeepGEMM's JITs write. No other is taken from a file.

Flags come from DeepGEMM itself while it is recorded, and from files: markers, plans and bundles. Other options of nvcc
run programs (``-ccbin``, ``--compiler-options=-wrapper,...``), read files (``--options-file``, ``-include``) and write
them (``-o``, ``-time``).
nvcc gives its command lines to a shell, so the path of an include directory must be a plain one.

Source: ``csrc/jit/compiler.hpp`` of DeepGEMM 0.1.x; ``include/deep_jit/backend/cuda/options.hpp`` of 0.2.x.
"""

from __future__ import annotations

import re

_ARCH = r"\d{2,3}[af]?"
_PTXAS = r"--(?:register-usage-level=\d+|verbose|warn-on-spills|warn-on-local-memory-usage)"
_HOST = r"-(?:fPIC|fconcepts|O[0-3]|Wno-[a-z-]+)"
# No quotes, no blanks, and nothing that a shell expands.
_PATH = r"(?!-)[\w./+@%=:~{}-]+"
_OPTIONS = re.compile(
    rf"""
      -std=c\+\+\d\d | -O[0-3] | --use_fast_math | -lineinfo | --generate-line-info
    | --expt-relaxed-constexpr | --expt-extended-lambda
    | --diag-suppress=\d+(?:,\d+)*
    | --gpu-architecture=sm_{_ARCH} | -gencode=arch=compute_{_ARCH},code=sm_{_ARCH}
    | --ptxas-options={_PTXAS}(?:,{_PTXAS})*
    | --compiler-options={_HOST}(?:,{_HOST})* | -Xcompiler[ ]-rdynamic
    | (?:-I|--include-path[ ])(?P<include>{_PATH})
    """,
    re.VERBOSE,
)
# Those whose value is the next word.
_OF_TWO_WORDS = ("-Xcompiler", "--include-path")


def unknown_option(flags: str, include: str | None = None) -> str | None:
    """The first option that no JIT of DeepGEMM writes, None if there is none.

    Args:
        flags: in one line, as a compiler is given them: words with blanks between them.
        include: the only include directory that they may name; any plain path if it is None.
    """
    words = iter(flags.split())
    for word in words:
        option = f"{word} {next(words, '')}" if word in _OF_TWO_WORDS else word
        found = _OPTIONS.fullmatch(option)
        if found is None or (include is not None and found["include"] not in (None, include)):
            return option
    return None
