"""What reaches across time: long convolutions through the engine, short filters directly, exponentials as a
recurrence, attention with its keys and values.

Sequences are `(B, T, ...)` and positions `(B, ...)`, features last, as the layers have them; the engine wants
time last, and takes any strides.
"""
