"""What runs inside SGLang's own processes. How it gets called is none of its business, so there are no hooks here.

These modules import SGLang inside functions, and of this package nothing but themselves, :mod:`..kernels` and
:mod:`..shapes`.
"""
