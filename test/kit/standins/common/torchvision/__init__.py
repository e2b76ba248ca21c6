"""Image operators: a text model needs none, and the published builds do not load beside a CPU build of torch."""

from _standin import stand_in

__version__ = "0.28.0"  # compared by transformers

stand_in(__name__)
