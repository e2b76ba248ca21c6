"""SGLang's CUDA kernels, for the release that imports them on every device; the newer one must not see this package."""

from _standin import stand_in

stand_in(__name__)
