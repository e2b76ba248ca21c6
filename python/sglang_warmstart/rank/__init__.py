"""What SGLang's processes run of the features, and no hook: the plugin puts it in place, or a patch of the series does.

These modules, :mod:`..kernels` and :mod:`..shapes` are what the patch series adds to SGLang's tree as
``sglang.srt.warmstart``. So they import nothing else of this package.
"""
