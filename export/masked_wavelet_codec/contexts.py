"""How likely a coefficient is kept, from what a reader knows already: integers only.

A coefficient's *score* is the sum of features times weights; the encoder fits the weights, and they
lie in the file. Features count in sixteenths: of one, or of an octave where they are logarithms.
What a reader knows of a coefficient:

- how many are kept at this place, and around it, in the channels before;
- how many are kept at this place in the grids before, of the same size;
- the class of the coefficient above it, at the coarser level, and the classes around that;
- within a channel, places are coded like the fields of a chessboard, white before black: a black
  field knows the white ones beside it.

Letters: C channels, B bands, d, h, w size (a plane has d = 1, a line h = 1, too).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from masked_wavelet_codec.ans import EVEN, NUM_LOGITS, weights_of

__all__ = [
    "LARGEST_WEIGHT",
    "NUM_WEIGHTS",
    "ChannelContexts",
    "around",
    "beside",
    "chessboard",
    "fields",
    "fit_weights",
    "logits_of",
    "octaves",
]

NUM_WEIGHTS = 12
_ONE = 16
"""What counts as one in a feature."""
_SHIFT = 7
"""A score is a logit times two to this."""
_LOGITS_IN_ONE = 16
"""How many logits the odds grow by a factor of e in."""
_MOST = 4095
"""Counts beyond this are taken for it."""
LARGEST_WEIGHT = 2**14
_ROUNDS = 12
"""Of Newton's method."""
_HALVINGS = 8
"""Of a step, at most."""
_RIDGE = 0.01
"""How strongly weights, of features of unit spread, are drawn to zero, in nats."""
_ENOUGH = 1e-7
"""A round that gains less than this share of all bits is the last."""


@functools.cache
def _table() -> np.ndarray:
    found, k = np.zeros(_MOST + 1, np.int32), 0
    for n in range(_MOST + 1):
        while 2 ** (k + 1) <= (4 * n + 1) ** 16:
            k += 1
        found[n] = k
    return found


def octaves(counts: np.ndarray | int) -> np.ndarray:
    """⌊16 · log2(4 n + 1)⌋ of counts n ≥ 0."""
    return _table().take(counts, mode="clip")


@dataclass
class ChannelContexts:
    """What is known of a grid's coefficients at one level, channel after channel."""

    size: tuple[int, int, int, int]
    """(B, d, h, w)."""
    above: np.ndarray | None
    """Classes at the coarser level, (C, B or 1, d', h', w') int; None at the coarsest."""
    others: np.ndarray
    """How many are kept in grids before, (B, d, h, w) int32."""
    kept: np.ndarray = field(init=False)
    """How many of the channels before keep each, (B, d, h, w) int32."""
    channel: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        B, *lengths = self.size
        self.kept = np.zeros(self.size, np.int32)
        self._of_others = octaves(self.others), octaves(self.others.sum(axis=0, keepdims=True))
        if self.above is None:
            return
        self._around_above = around(self.above.astype(np.int32))
        scale = B // max(self.above.shape[1], 1)
        self._num_above = scale * np.count_nonzero(self.above, axis=(1, 2, 3, 4))
        self._below = [
            np.arange(length) * coarse // max(length, 1)
            for length, coarse in zip(lengths, self.above.shape[2:], strict=True)
        ]

    def features(self) -> Iterator[tuple[np.ndarray, bool]]:
        """The next channel's, each (B, d, h, w) or less, or one of the coarser level: and which.

        Those of black fields, :meth:`of_black`, are left out.
        """
        expected = octaves(self.channel) + 2 * _ONE
        yield np.array(_ONE), False
        yield octaves(self.kept) - expected, False
        yield octaves(self.kept.sum(axis=0, keepdims=True)) - expected, False
        yield octaves(around(self.kept)) - expected, False
        for of_others in self._of_others:
            yield of_others, False
        if self.above is not None:
            above = self.above[self.channel].astype(np.int32)
            yield _ONE * above, True
            yield _ONE * (above > 0), True
            yield _ONE * self._around_above[self.channel], True
            yield octaves(self._num_above[self.channel]), False

    def scores(self, weights: Sequence[int]) -> np.ndarray:
        """Σ weight · feature of the next channel (B, d, h, w), but for those of black fields."""
        fine = np.zeros(self.size, np.int32)
        coarse = np.zeros((1, 1, 1, 1), np.int32)
        for weight, (feature, is_coarse) in zip(weights, self.features(), strict=False):
            if is_coarse:
                coarse = coarse + np.int32(weight) * feature
            elif weight:
                fine += np.int32(weight) * feature
        return fine if self.above is None else fine + self.refined(coarse)

    def of_black(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two features more of black fields: kept white ones beside each, in ``mask``; and one."""
        return _ONE * beside(mask), np.array(_ONE)

    def refined(self, coarse: np.ndarray) -> np.ndarray:
        """Values of the coarser level, (B or 1, d', h', w'), at the places of this one."""
        # A fancy index of all axes at once takes ten times as long.
        for axis in (3, 2, 1):
            if coarse.shape[axis] > 1 or self.size[axis] > 1:
                coarse = coarse.take(self._below[axis - 1], axis=axis)
        return coarse

    def advance(self, mask: np.ndarray) -> None:
        """Takes in the channel's mask, (B, d, h, w) bool."""
        self.kept += mask
        self.channel += 1


def logits_of(scores: np.ndarray) -> np.ndarray:
    """Logits of sums of features times weights."""
    rounded = (scores + (1 << _SHIFT - 1) >> _SHIFT) + EVEN
    return np.clip(rounded, 0, NUM_LOGITS - 1)


def fit_weights(features: np.ndarray, kept: np.ndarray, counts: np.ndarray) -> list[int]:
    """Weights that suit a sample, by logistic regression; never worse than its mean alone.

    Args:
        features: (F, N).
        kept: which are kept, (N,) bool.
        counts: how many coefficients each stands for, (N,).
    """
    scale = features.std(axis=1, keepdims=True) + 1.0
    inputs = features / scale
    weights = np.zeros(len(features))
    chance = np.clip((counts * kept).sum() / max(counts.sum(), 1), 1e-5, 1 - 1e-5)
    weights[0] = np.log(chance / (1 - chance)) * scale[0, 0] / _ONE
    mean_alone = weights

    def loss(weights: np.ndarray) -> float:
        scores = weights @ inputs
        spent = counts @ (np.logaddexp(0, scores) - kept * scores)
        return spent + _RIDGE / 2 * weights @ weights

    before = loss(weights)
    for _ in range(_ROUNDS):
        chances = 1 / (1 + np.exp(-np.clip(weights @ inputs, -30, 30)))
        slope = counts * chances * (1 - chances) + 1e-9 * counts
        hessian = (inputs * slope) @ inputs.T
        hessian[np.diag_indices_from(hessian)] += _RIDGE + 1e-9 * np.trace(hessian)
        step = np.linalg.solve(hessian, inputs @ (counts * (kept - chances)) - _RIDGE * weights)
        step /= max(1.0, np.abs(step).max() / 2)
        # Shorter where it goes too far: else it swings to and fro where features tell nearly all.
        after = loss(weights + step)
        for _ in range(_HALVINGS):
            if after <= before:
                break
            step /= 2
            after = loss(weights + step)
        weights, gain, before = weights + step, before - after, after
        if 0 <= gain < _ENOUGH * before:
            break

    def nats(weights: np.ndarray) -> float:
        chances = weights_of(logits_of(weights @ features)) / 2**16
        return -counts @ np.log(np.where(kept, chances, 1 - chances))

    # Where a handful is kept, features may tell all of the sample, and weights grow without bound.
    return min((_as_integers(w / scale[:, 0]) for w in (weights, mean_alone)), key=nats).tolist()


def _as_integers(weights: np.ndarray) -> np.ndarray:
    """Rounded as they are written; where one is too large, all become smaller together."""
    scaled = _LOGITS_IN_ONE * weights * (1 << _SHIFT)
    scaled *= min(1.0, LARGEST_WEIGHT / max(1.0, np.abs(scaled).max()))
    return np.rint(scaled).astype(np.int64)


def around(values: np.ndarray) -> np.ndarray:
    """Sum of each and its neighbours, diagonal ones too, in (…, d, h, w); outside is nothing."""
    found = values
    for axis in (-3, -2, -1):
        if values.shape[axis] > 1:
            found, lower = found.copy(), found
            for to, start in _shifts(axis):
                found[to] += lower[start]
    return found


def beside(values: np.ndarray) -> np.ndarray:
    """Sum of the two neighbours of each along each of the last three axes, int32.

    Args:
        values: bools or signs, (…, d, h, w).
    """
    values = values.astype(np.int8)
    found = np.zeros(values.shape, np.int8)
    for axis in (-3, -2, -1):
        for to, start in _shifts(axis):
            found[to] += values[start]
    return found.astype(np.int32)


def _shifts(axis: int) -> Iterator[tuple[tuple, tuple]]:
    """Where to and where from, for each side that neighbours along an axis can lie on."""
    rest = (slice(None),) * (-axis - 1)
    low, high = (..., slice(None, -1), *rest), (..., slice(1, None), *rest)
    yield high, low
    yield low, high


@functools.lru_cache(maxsize=64)
def chessboard(d: int, h: int, w: int) -> np.ndarray:
    """(d, h, w) bool: which fields are black."""
    parities = (np.arange(length) % 2 for length in (d, h, w))
    return functools.reduce(np.not_equal.outer, parities).astype(np.bool_)


@functools.lru_cache(maxsize=16)
def fields(size: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions, in a flat (B, d, h, w), of white fields, and of black ones."""
    black = np.broadcast_to(chessboard(*size[1:]), size)
    return np.flatnonzero(~black), np.flatnonzero(black)
