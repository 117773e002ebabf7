"""Convolution of a long sequence that comes in pieces, each answered before the next one is known.

The outputs of a whole sequence from one transform would need all inputs first. So the sequence is tiled, as
everywhere in this package, but with blocks of thousands of positions, and for one layer at a time: the
spectra of the last few blocks are multiplied with spectra of the filters' first lags; every `FAN` blocks a
tile takes the newest inputs to as many outputs to come (the paper's FutureFill), all in memory of one or two
arrays of all positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import futurefill_rs as ff
from futurefill_rs._args import broadcast
from futurefill_rs.nn.operators.precision import at_least_float32

FAN = 16
"""Blocks between which products of spectra are summed; further apart it is tiles."""

TILE = 1 << 16
"""Positions of the blocks within tiles, at most: transforms of longer ones leave the caches."""

FEW_LAGS = 256
"""Filters up to here run over each piece and what came right before it, without spectra kept."""

CHUNK = 1 << 22
"""Numbers that are transformed at a time."""


def windows(lags: Tensor, block: int, first: int, count: int) -> Tensor:
    """Spectra `(*F, count, block + 1)` of lags `(j - 1) block` to `(j + 1) block` for j from `first` on.

    Times the spectrum of a block of inputs, padded to twice its length, they give in their second half what
    it adds to the outputs of the block j blocks later.
    """
    begin, end = (first - 1) * block, (first + count) * block
    part = lags[..., max(0, begin) : max(0, min(end, lags.shape[-1]))]
    before = min(max(0, -begin), end - begin)
    part = F.pad(part, (before, end - begin - before - part.shape[-1]))
    spectra: Tensor = torch.fft.rfft(part.unfold(-1, 2 * block, block))
    return spectra


def channels(u: Tensor, lags: Tensor, each: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """u `(.., D, T)` and the filters for it in parts of channels, with `each` numbers transformed for one."""
    rows = max(1, u[..., :1, 0].numel())
    step = max(1, CHUNK // max(1, rows * each))
    for start in range(0, u.shape[-2], step):
        part = slice(start, start + step)
        yield u[..., part, :], lags if lags.shape[-2] == 1 else lags[..., part, :], part


def carried(u: Tensor, lags: Tensor, out: Tensor) -> None:
    """Add to `out` `(*O, K)`, the K outputs right after the inputs u `(*C, T)`, what these add to them.

    The paper's FutureFill, in blocks that fit a core's caches.
    """
    reach = lags.shape[-1] - 1
    u, out = u[..., max(0, u.shape[-1] - reach) :], out[..., :reach]
    length, count = u.shape[-1], out.shape[-1]
    if not length or not count:
        return
    block = min(TILE, 1 << (max(count, min(length, 4096)) - 1).bit_length())
    inputs, outputs = -(-length // block), -(-count // block)
    for x, filters, part in channels(u, lags, 2 * block * (inputs + outputs)):
        x = F.pad(x, (inputs * block - length, 0))
        x = x.reshape(*x.shape[:-1], inputs, block)
        spectra = torch.fft.rfft(x, 2 * block)
        taps = windows(filters, block, 1, inputs + outputs - 1)
        target = out[..., part, :]
        for i in range(outputs):
            total = spectra[..., inputs - 1, :] * taps[..., i, :]
            for j in range(1, inputs):
                total.addcmul_(spectra[..., inputs - 1 - j, :], taps[..., i + j, :])
            y = torch.fft.irfft(total, 2 * block)[..., block:]
            there = target[..., i * block : (i + 1) * block]
            there += y[..., : there.shape[-1]]


class FewLagsReader:
    """Filters of few lags: each piece with the inputs right before it."""

    def __init__(self, lags: Tensor, u: Tensor) -> None:
        self._lags = lags
        self._past = u[..., :0]

    def extend(self, u: Tensor) -> Tensor:
        x = torch.cat([self._past, u], -1)
        known = self._past.shape[-1]
        self._past = x[..., max(0, x.shape[-1] - self._lags.shape[-1] + 1) :].clone()
        y: Tensor = ff.causal_conv(x, self._lags)
        return y[..., known:]

    def following(self, count: int) -> Tensor:
        """What the inputs add to the `count` outputs after the last one, `(*O, count)`."""
        past = at_least_float32(self._past).to(self._lags.dtype)
        known = past.shape[-1]
        y: Tensor = ff.causal_conv(F.pad(past, (0, count)), self._lags)
        return y[..., known:]


class ManyLagsReader:
    """Filters of many lags.

    Args:
        lags: `(*F, L)`, those that the sequence and what is wanted after it reach.
        u: the first piece `(*C, n)`: blocks are as long.
        length: positions of the sequence.
    """

    def __init__(self, lags: Tensor, u: Tensor, length: int) -> None:
        self._lags, self._length = lags, length
        dtype = torch.promote_types(lags.dtype, at_least_float32(u[..., :0]).dtype)
        self._block = block = max(1, u.shape[-1])
        self._shape = broadcast(tuple(u.shape[:-1]), tuple(lags.shape[:-1]), "u")
        # Block j back reaches a position of this one where lag (j - 1) block + 1 exists.
        reached = max(0, lags.shape[-1] - 2) // block + 2
        self._fan = min(FAN, reached, -(-length // block))
        self._tiled = self._fan < min(reached, -(-length // block))
        self._taps = torch.cat(
            [windows(some, block, 0, self._fan) for _, some, _ in channels(lags, lags, 2 * block)], -3
        )
        self._spectra: deque[Tensor] = deque(maxlen=self._fan)
        self._at = 0
        # What is still to come is written where inputs will be, if they have the same shape.
        self._past = u.new_zeros(*u.shape[:-1], length, dtype=dtype)
        self._due = self._past
        if self._tiled and self._shape != tuple(u.shape[:-1]):
            self._due = u.new_zeros(*self._shape, length, dtype=dtype)

    def extend(self, u: Tensor) -> Tensor:
        y = u.new_empty(*self._shape, u.shape[-1])
        done = 0
        while done < u.shape[-1]:
            begin = self._at % self._block
            count = min(self._block - begin, u.shape[-1] - done)
            part = slice(done, done + count)
            self._within_block(u[..., part], y[..., part], begin)
            done += count
        return y

    def _within_block(self, u: Tensor, y: Tensor, begin: int) -> None:
        """Outputs y at positions from `begin` of the present block on, which u `(*C, m)` begins or goes on
        with."""
        start, stop = self._at - begin, self._at + u.shape[-1]
        block, now = self._block, slice(self._at, self._at + u.shape[-1])
        due = self._due[..., now].clone() if self._tiled else None
        self._past[..., now] = u
        x = self._past[..., start:stop]
        spectra = None
        for part, _, channel in channels(x, self._lags, 2 * block):
            spectrum = torch.fft.rfft(part, 2 * block)
            taps = self._taps if self._taps.shape[-3] == 1 else self._taps[..., channel, :, :]
            total = spectrum * taps[..., 0, :]
            for j, earlier in enumerate(reversed(self._spectra), 1):
                if j < self._fan:
                    total.addcmul_(earlier[..., channel, :], taps[..., j, :])
            new = torch.fft.irfft(total, 2 * block)[..., block + begin : block + begin + u.shape[-1]]
            y[..., channel, :] = new if due is None else new + due[..., channel, :]
            if spectra is None:
                spectra = spectrum.new_empty(*x.shape[:-1], spectrum.shape[-1])
            spectra[..., channel, :] = spectrum
        self._at = stop
        if stop % block == 0 and spectra is not None:
            self._block_is_complete(spectra)

    def _block_is_complete(self, spectra: Tensor) -> None:
        self._spectra.append(spectra)
        whole, rest = divmod(self._at // self._block, self._fan)
        if self._tiled and not rest:
            # As many blocks as the number of those before is divisible by, as in the paper's Algorithm 2.
            self._spectra.clear()
            size = (whole & -whole) * self._fan * self._block
            to = self._due[..., self._at : self._at + size]
            carried(self._past[..., self._at - size : self._at], self._lags, to)

    def following(self, count: int) -> Tensor:
        """What the inputs add to the `count` outputs after the last one, `(*O, count)`."""
        y = self._past.new_zeros(*self._shape, count)
        carried(self._past, self._lags, y)
        return y
