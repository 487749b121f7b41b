"""Decisions of known probability to words and back: the arithmetic under profile ``range``.

Everything is coded as yes-or-no decisions. A *weight* a, 16 to 65520, is the probability a / 65536
that a decision is yes. The coder is constriction's range variant of asymmetric numeral systems:
words of 32 bits, a state of 64, probabilities of 24. Weights are integers, and what constriction
makes of them in double precision is exact, so every machine reads the same decisions.

A *logit* t, 0 to 511, stands for the weight 65536 / (1 + exp((256 - t) / 16)).
"""

from __future__ import annotations

import decimal
import functools
from collections.abc import Iterable
from typing import Any, Protocol

import constriction
import numpy as np

from masked_wavelet_codec.binary import Reader, Writer

__all__ = [
    "EVEN",
    "HALF",
    "MOST_PER_BYTE",
    "NUM_LOGITS",
    "Coder",
    "Decoder",
    "Encoder",
    "Meter",
    "expect_room",
    "logit_of",
    "read_logits",
    "weights_of",
    "weights_of_counts",
    "write_logits",
]

NUM_LOGITS = 512
EVEN = NUM_LOGITS // 2
"""The logit of even odds."""
_TOTAL = 2**16
HALF = _TOTAL // 2
"""The weight of even odds."""
_LEAST = 16
"""So that a decision costs 1 / 2840 bit at least: a short file cannot keep a reader busy."""
MOST_PER_BYTE = 2**15
"""More decisions than a byte can hold."""
_START = 2**24
"""The coder's state before the first decision: below it, "no" would cost nothing for ever, and a
file cut short could go unnoticed. Decoding never goes below it either."""
_UNIT = 2
"""Logits in a file are a byte each, in steps of this."""

_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] (it has no stubs)
_YES_OR_NO = _stream.model.Categorical(perfect=False)
"""Of two probabilities for each decision: twice as fast as constriction's Bernoulli model."""


class Coder(Protocol):
    """What encoding and decoding share, so that one function describes the order of both."""

    def code(self, weights: np.ndarray, decisions: np.ndarray | None) -> np.ndarray:
        """Decisions (N,) bool of weights (N,); given when encoding, found when decoding."""
        ...


class Encoder:
    """Collects decisions; the coder works like a stack, so the last one goes in first."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def code(self, weights: np.ndarray, decisions: np.ndarray | None) -> np.ndarray:
        """Takes the decisions in, and gives them back."""
        assert decisions is not None
        self._parts.append((weights.astype(np.uint16), decisions))
        return decisions

    def getvalue(self) -> bytes:
        """All decisions as little-endian words."""
        if not any(len(weights) for weights, _ in self._parts):
            return b""
        coder = _stream.stack.AnsCoder(np.array([_START], np.uint32))
        for weights, decisions in reversed(self._parts):
            coder.encode_reverse(decisions.astype(np.int32), _YES_OR_NO, _chances(weights))
        return coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Reads decisions from the rest of a section.

    Raises:
        CodecError: if the rest is not whole words, or no encoder would have written it.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        data = reader.rest()
        if len(data) % 4:
            raise reader.error(f"coded decisions are whole words, {len(data)} bytes are left")
        words = np.frombuffer(data, "<u4").astype(np.uint32)
        if len(words) and not words[-1]:
            raise reader.error("the last word of coded decisions is zero")
        self._coder = _stream.stack.AnsCoder(words if len(words) else np.array([_START], np.uint32))

    def code(self, weights: np.ndarray, decisions: np.ndarray | None) -> np.ndarray:
        """The next decisions."""
        assert decisions is None
        if not len(weights):
            return np.zeros(0, np.bool_)
        found = self._coder.decode(_YES_OR_NO, _chances(weights)).astype(np.bool_)
        if self._coder.pos()[1] < _START:
            raise self._reader.error("the coded decisions end too early")
        return found

    def finish(self) -> None:
        """Check that the words hold these decisions and nothing else."""
        if self._coder.pos() != (0, _START):
            raise self._reader.error("the coded decisions do not end where they should")


class Meter:
    """Takes decisions as an encoder does, and counts what they cost."""

    def __init__(self) -> None:
        self.bits = 0.0
        """Of all decisions so far, without the rounding to whole words."""
        self._weights: list[np.ndarray] = []

    def code(self, weights: np.ndarray, decisions: np.ndarray | None) -> np.ndarray:
        """Counts the next decisions."""
        assert decisions is not None
        taken = np.where(decisions, weights, _TOTAL - weights)
        self.bits -= float(np.log2(taken / _TOTAL).sum())
        self._weights.append(weights)
        return decisions

    def log_odds(self) -> np.ndarray:
        """log2 of the odds of a yes, float32, for each decision so far."""
        weights = np.concatenate(self._weights).astype(np.float32)
        return np.log2(weights / (np.float32(_TOTAL) - weights))


def expect_room(reader: Reader, num_bytes: int, count: int) -> None:
    """Check, before memory is taken, that so many bytes can hold so many decisions.

    Raises:
        CodecError: if they cannot.
    """
    if count > MOST_PER_BYTE * (num_bytes + 8):
        raise reader.error(f"{num_bytes} bytes cannot hold {count} decisions")


def _chances(weights: np.ndarray) -> np.ndarray:
    """Probabilities (N, 2) of no and yes: exact, as both are multiples of 2**-16."""
    found = np.empty((len(weights), 2))
    np.multiply(weights, 1 / _TOTAL, out=found[:, 1])
    np.subtract(1, found[:, 1], out=found[:, 0])
    return found


def weights_of(logits: np.ndarray) -> np.ndarray:
    """Weights (N,) int32 of logits (N,), each within 0 to 511."""
    return _weights()[logits]


def weights_of_counts(yes: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Weights (N,) int32 of what was seen so far: ⌊65536 (5 yes + 2) / (5 total + 4)⌋, limited."""
    exact = _TOTAL * (5 * yes.astype(np.int64) + 2) // (5 * total.astype(np.int64) + 4)
    return np.clip(exact, _LEAST, _TOTAL - _LEAST).astype(np.int32)


@functools.cache
def _weights() -> np.ndarray:
    # Not in floating point, whose exponential may differ in the last bit: these are the format.
    with decimal.localcontext() as context:
        context.prec = 40
        odds = [(decimal.Decimal(EVEN - t) / 16).exp() for t in range(NUM_LOGITS)]
        weights = [int((_TOTAL / (1 + x)).to_integral_value()) for x in odds]
    return np.clip(np.array(weights, np.int32), _LEAST, _TOTAL - _LEAST)


def logit_of(num_yes: float, num_no: float) -> int:
    """The logit that suits so many decisions, of those that a file can hold."""
    exact = 16 * np.log((num_yes + 0.4) / (num_no + 0.4)) + EVEN
    return _UNIT * int(np.clip(np.rint(exact / _UNIT), 0, NUM_LOGITS // _UNIT - 1))


def write_logits(writer: Writer, logits: Iterable[int]) -> None:
    """Appends them, a byte each."""
    writer.raw(bytes(logit // _UNIT for logit in logits))


def read_logits(reader: Reader, count: int) -> tuple[int, ...]:
    """Inverse of :func:`write_logits`."""
    return tuple(_UNIT * byte for byte in reader.raw(count))
