"""CUDA operators of vLLM."""

from _standin import stand_in

stand_in(__name__)
