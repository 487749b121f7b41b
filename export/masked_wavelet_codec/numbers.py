"""Integers as decisions: is it more than 0, 1, 3, 7, …; the bits that are left; the sign.

The *class* of an integer v is the number of bits of |v|: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4
to 7, …. A class k is the decisions "more than class 0?", "more than class 1?", … up to the first
no; then come the k - 1 bits below the top one, the highest with a probability of its own class,
the others with even odds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from masked_wavelet_codec.ans import (
    EVEN,
    HALF,
    Coder,
    logit_of,
    read_logits,
    weights_of,
    write_logits,
)
from masked_wavelet_codec.binary import Reader, Writer

__all__ = ["NumberModel", "class_of", "code_magnitudes", "code_numbers"]

_MAX_CLASS = 15


@dataclass(frozen=True)
class NumberModel:
    """Probabilities of the decisions that make an integer."""

    more: tuple[int, ...]
    """Logit of "more than class k", for k below the largest class."""
    top: tuple[int, ...]
    """Logit of the highest bit below the top one, for classes 2 up to the largest."""

    @classmethod
    def fit(cls, values: np.ndarray) -> NumberModel:
        """What suits these integers."""
        counts = np.bincount(class_of(values), minlength=1)
        beyond = counts[::-1].cumsum()[::-1]
        more = [logit_of(beyond[k + 1], counts[k]) for k in range(len(counts) - 1)]
        magnitudes, classes = np.abs(values.astype(np.int32)), class_of(values)
        top = []
        for k in range(2, len(counts)):
            bits = magnitudes[classes == k] >> (k - 2) & 1
            top.append(logit_of(bits.sum(), len(bits) - bits.sum()))
        return cls(tuple(more), tuple(top))

    def write(self, writer: Writer) -> None:
        """Largest class (u8), then the logits."""
        writer.u8(len(self.more))
        write_logits(writer, (*self.more, *self.top))

    @classmethod
    def read(cls, reader: Reader) -> NumberModel:
        """Inverse of :meth:`write`."""
        largest = reader.u8()
        if largest > _MAX_CLASS:
            raise reader.error(f"numbers of {largest} bits, expected {_MAX_CLASS} at most")
        return cls(read_logits(reader, largest), read_logits(reader, max(largest - 1, 0)))


def class_of(values: np.ndarray) -> np.ndarray:
    """Number of bits of |v|, int8, for integers below 2**24."""
    return np.frexp(np.abs(values.astype(np.float32)))[1].astype(np.int8)


def code_magnitudes(
    coder: Coder, model: NumberModel, count: int, magnitudes: np.ndarray | None
) -> np.ndarray:
    """Codes |v| of ``count`` integers: their classes one decision at a time, then their bits."""
    given = None if magnitudes is None else class_of(magnitudes)
    classes = np.zeros(count, np.int8)
    alive = np.arange(count)
    for k, weight in enumerate(weights_of(np.array(model.more, np.int64))):
        more = coder.code(np.full(len(alive), weight), None if given is None else given[alive] > k)
        alive = alive[more]
        classes[alive] = k + 1
    found = (np.int32(1) << np.maximum(classes, 1).astype(np.int32) - 1) * (classes > 0)
    for k in range(2, len(model.more) + 1):
        alive = np.flatnonzero(classes >= k)
        # The k-th decision of all numbers that have one: bit (class - k) of each.
        place = classes[alive].astype(np.int32) - k
        weights = np.full(len(alive), HALF)
        if k == 2:
            weights = weights_of(np.array((EVEN, EVEN, *model.top)))[classes[alive]]
        bits = coder.code(
            weights, None if magnitudes is None else (magnitudes[alive] >> place & 1).astype(bool)
        )
        found[alive] |= bits.astype(np.int32) << place
    return found


def code_numbers(
    coder: Coder, model: NumberModel, count: int, values: np.ndarray | None
) -> np.ndarray:
    """Codes ``count`` integers, signs with even odds; int32."""
    if not model.more:  # all are zero
        return np.zeros(count, np.int32)
    found = code_magnitudes(coder, model, count, None if values is None else np.abs(values))
    signed = found > 0
    weights = np.full(np.count_nonzero(signed), HALF)
    positive = coder.code(weights, None if values is None else values[signed] > 0)
    found[signed] *= np.where(positive, 1, -1)
    return found
