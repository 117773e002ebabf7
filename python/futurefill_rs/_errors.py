"""Errors of the public API."""

from futurefill_rs._core import CapacityError

__all__ = ["CapacityError"]
