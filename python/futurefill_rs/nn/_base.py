"""Names that moved."""

from futurefill_rs.nn.cache import Cache, integer
from futurefill_rs.nn.layer import Layer
from futurefill_rs.nn.protocol import Time, padded, whole

__all__ = ["Cache", "Layer", "Time", "integer", "padded", "whole"]
