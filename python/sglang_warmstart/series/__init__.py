"""The plugin's features as patches of SGLang's own source: list, check, apply, revert and export them.

``patchfile`` and ``series`` read what is shipped in ``data``, ``hunks`` changes the bytes of one file, ``view`` says
what holds for a whole tree, ``tree`` finds that tree, ``transaction`` writes to it, ``commands`` is the command line.
"""
