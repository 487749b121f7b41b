"""Profile ``range``: masks and values of a level together, each grid knowing those before it.

    coefficients[level]   for each *family* at this level: its model · words of all decisions

A family is a row of grids that follow each other and have the same dimensions and channels: the
three density planes, say. They share their model. Grids are coded one after the other: the mask,
channel by channel, and then the values of what it keeps. See ``contexts``, ``numbers`` and ``ans``
for what a decision is and how likely. One function, ``_code_grid``, describes the order for
encoder and decoder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from masked_wavelet_codec import contexts
from masked_wavelet_codec.ans import (
    EVEN,
    Coder,
    Decoder,
    Encoder,
    Meter,
    expect_room,
    logit_of,
    read_logits,
    weights_of,
    write_logits,
)
from masked_wavelet_codec.binary import Budget, Reader, Writer, fold, unfold
from masked_wavelet_codec.container import Section, SectionType
from masked_wavelet_codec.contexts import NUM_WEIGHTS, ChannelContexts, chessboard
from masked_wavelet_codec.errors import CodecError
from masked_wavelet_codec.layout import BandLayout, Layout
from masked_wavelet_codec.numbers import NumberModel, class_of, code_magnitudes
from masked_wavelet_codec.scene import BYTES_PER_COEFFICIENT, Band, Grid
from masked_wavelet_codec.validation import largest_value

__all__ = ["Measured", "decode_levels", "encode_levels", "measure"]

_MOST_CHANNELS = 2**13
"""With a mask, of all grids at all levels: each takes a fifth of a millisecond, however small."""
_MOST_APART = 3
"""Channels of which one is looked at for the weights, at most."""
_SAMPLES = 1 << 15
"""Kept coefficients, about, that a family's weights are fitted to, and as many dropped ones."""


_Member = tuple[int, BandLayout, np.ndarray, np.ndarray]
"""A grid's number, its layout at the level, values and mask, both (C, B, d, h, w)."""


@dataclass(frozen=True)
class _Model:
    """What the decoder is told of a family at a level."""

    weights: tuple[int, ...]
    numbers: NumberModel
    same_sign: int
    """Logit: a value has the sign of the white ones beside it."""

    def write(self, writer: Writer) -> None:
        for folded in fold(np.array(self.weights, np.int64)).tolist():
            writer.varint(folded)
        self.numbers.write(writer)
        write_logits(writer, [self.same_sign])

    @classmethod
    def read(cls, reader: Reader) -> _Model:
        folded = np.array(reader.varints(NUM_WEIGHTS), np.int64)
        if folded.max() > 2 * contexts.LARGEST_WEIGHT:
            raise reader.error(f"a weight beyond ±{contexts.LARGEST_WEIGHT}")
        return cls(
            tuple(unfold(folded).tolist()), NumberModel.read(reader), *read_logits(reader, 1)
        )


class _Known:
    """What has been coded: the level before, and how many are kept at each place of this one."""

    def __init__(self) -> None:
        self._classes: dict[int, np.ndarray] = {}
        self._kept: dict[tuple, np.ndarray] = {}

    def begin_level(self) -> None:
        self._kept = {}

    def contexts(
        self, number: int, shape: tuple[int, int, int, int, int], key: tuple
    ) -> ChannelContexts:
        above = self._classes.get(number)
        if above is not None and not above.size:
            above = np.zeros((shape[0], 1, 1, 1, 1), np.int8)
        others = self._kept.get(key, np.zeros(shape[1:], np.int32))
        return ChannelContexts(shape[1:], above, others)

    def add(self, number: int, values: np.ndarray, mask: np.ndarray, key: tuple) -> None:
        # One more than that of a kept coefficient's value, which may be zero.
        classes = np.zeros(mask.shape, np.int8)
        classes[mask] = class_of(values[mask]) + 1
        self._classes[number] = classes
        kept = mask.sum(axis=0, dtype=np.int32)
        self._kept[key] = self._kept.get(key, 0) + kept


def _count_channels(layouts: Sequence[tuple[int, BandLayout]], before: int, where: str) -> int:
    """Adds those that have a mask.

    Raises:
        CodecError: if there are too many.
    """
    masked = [band.shape[0] for _, band in layouts if 0 < band.num_kept < band.count]
    if before + sum(masked) > _MOST_CHANNELS:
        raise CodecError(
            f"{where}: more than {_MOST_CHANNELS} channels of grids and levels with a mask; the "
            "profile 'paper' has no such limit"
        )
    return before + sum(masked)


def _five(shape: Sequence[int]) -> tuple[int, int, int, int, int]:
    """(C, B, d, h, w) of a band: a plane has d = 1, a line h = 1, too."""
    d, h, w = (1, 1, *shape[2:])[-3:]
    return shape[0], shape[1], d, h, w


def _families(layouts: Sequence[tuple[int, BandLayout]]) -> Iterator[list[tuple[int, BandLayout]]]:
    def kind(item: tuple[int, BandLayout]) -> tuple[int, int]:
        return len(item[1].shape), item[1].shape[0]

    for _, members in itertools.groupby(layouts, kind):
        yield list(members)


def _keys(layouts: Sequence[tuple[int, BandLayout]]) -> dict[int, tuple]:
    """For each grid, what it shares with the grids of other families that lie at its places."""
    return {
        number: (place, band.shape[1:])
        for family in _families(layouts)
        for place, (number, band) in enumerate(family)
    }


def _code_mask(
    coder: Coder, context: ChannelContexts, weights: Sequence[int], given: np.ndarray | None, C: int
) -> np.ndarray:
    """Codes a mask, (C, B, d, h, w) bool, channel by channel, white fields before black ones."""
    found = np.zeros((C, *context.size), np.bool_)
    white, black = contexts.fields(context.size)
    for c in range(C):
        mask = found[c].reshape(-1)
        decided = None if given is None else given[c].reshape(-1)
        scores = context.scores(weights).reshape(-1)
        for places in (white, black):
            some = scores[places]
            if places is black:
                beside, one = context.of_black(found[c])
                some = some + weights[-2] * beside.reshape(-1)[places] + weights[-1] * one
            chances = weights_of(contexts.logits_of(some))
            mask[places] = coder.code(chances, None if decided is None else decided[places])
        context.advance(found[c])
    return found


def _code_values(
    coder: Coder, model: _Model, mask: np.ndarray, given: np.ndarray | None
) -> np.ndarray:
    """Codes the values, (C, B, d, h, w) int32, of what is kept, white fields before black ones."""
    black = chessboard(*mask.shape[2:])
    found = np.zeros(mask.shape, np.int32)
    if not model.numbers.more:  # all are zero
        return found
    for fields in (~black, black):
        where = np.nonzero(mask & fields)
        values = None if given is None else given[where].astype(np.int32)
        magnitudes = code_magnitudes(
            coder, model.numbers, len(where[0]), None if values is None else np.abs(values)
        )
        signed = magnitudes > 0
        expected = np.zeros(len(magnitudes), np.int32)
        if fields is black:
            expected = np.sign(contexts.beside(np.sign(found))[where])
        logits = np.where(expected == 0, EVEN, model.same_sign)[signed]
        # With nothing to expect, the decision is "positive".
        expected = np.where(expected == 0, 1, expected)[signed]
        same = None if values is None else np.sign(values[signed]) == expected
        same = coder.code(weights_of(logits), same)
        magnitudes[signed] *= np.where(same, expected, -expected)
        found[where] = magnitudes
    return found


def encode_levels(_bits: int, grids: Sequence[Grid]) -> Iterator[Section]:
    """The sections of all levels, coarse first; the width of the quantiser does not matter here."""
    known, num_channels = _Known(), 0
    for level, bands in _by_level(grids):
        layouts = _layouts(level, bands)
        num_channels = _count_channels(layouts, num_channels, f"level {level}")
        keys, writer, encoder = _keys(layouts), Writer(), Encoder()
        known.begin_level()
        for model, members in _with_models(known, layouts, bands, keys):
            model.write(writer)
            for number, band, values, mask in members:
                coders = encoder, encoder
                _code_grid(coders, known, model, number, band, keys[number], values, mask)
        writer.raw(encoder.getvalue())
        yield Section(SectionType.COEFFICIENTS, level, writer.getvalue())


@dataclass(frozen=True)
class Measured:
    """What the coefficients of some grids cost in this profile, and what each of them would."""

    bits: float
    """All decisions together; models and frames of a file, some hundred bytes, not counted."""
    prices: list[list[np.ndarray]]
    """For each grid and level, of the shape of its values, float32: bits that keeping a coefficient
    costs more than dropping it, the others being as they are; below zero where it is expected."""


def measure(grids: Sequence[Grid]) -> Measured:
    """What :func:`encode_levels` would spend, and where."""
    known, bits = _Known(), 0.0
    prices: list[list[np.ndarray]] = [[] for _ in grids]
    for level, bands in _by_level(grids):
        layouts = _layouts(level, bands)
        keys = _keys(layouts)
        known.begin_level()
        for model, members in _with_models(known, layouts, bands, keys):
            of_masks, of_values = [Meter() for _ in members], Meter()
            for (number, band, values, mask), meter in zip(members, of_masks, strict=True):
                coders = meter, of_values
                _code_grid(coders, known, model, number, band, keys[number], values, mask)
            num_kept = sum(band.num_kept for _, band, _, _ in members)
            of_value = of_values.bits / max(num_kept, 1)
            for (number, band, _, _), meter in zip(members, of_masks, strict=True):
                # As _code_mask goes: channel by channel, white fields before black ones.
                shape = _five(band.shape)
                order = np.concatenate(contexts.fields(shape[1:]))
                odds = np.empty((shape[0], math.prod(shape[1:])), np.float32)
                if 0 < band.num_kept < band.count:
                    odds[:, order] = meter.log_odds().reshape(-1, order.size)
                else:  # nothing is coded, but the first exception would be
                    odds[:] = np.log2(band.count + 1) * (1 if band.num_kept else -1)
                prices[number].append((of_value - odds).reshape(band.shape))
                bits += meter.bits
            bits += of_values.bits
    return Measured(bits, prices)


def _by_level(grids: Sequence[Grid]) -> Iterator[tuple[int, dict[int, Band]]]:
    """Coarse first: the bands of a level, by the number of the grid."""
    for level in range(max((len(grid.bands) for grid in grids), default=0)):
        yield (
            level,
            {n: grid.bands[level] for n, grid in enumerate(grids) if level < len(grid.bands)},
        )


def _layouts(level: int, bands: dict[int, Band]) -> list[tuple[int, BandLayout]]:
    return [
        (n, BandLayout(level, b.values.shape, b.values.size, int(b.mask.sum()), b.step))
        for n, b in bands.items()
    ]


def _with_models(
    known: _Known,
    layouts: Sequence[tuple[int, BandLayout]],
    bands: dict[int, Band],
    keys: dict[int, tuple],
) -> Iterator[tuple[_Model, list[_Member]]]:
    """The families of a level with their models, each fitted once those before are coded."""
    for family in _families(layouts):
        members = [
            (
                number,
                band,
                bands[number].values.reshape(_five(band.shape)),
                bands[number].mask.reshape(_five(band.shape)),
            )
            for number, band in family
        ]
        yield _fit(known, members, keys), members


def _code_grid(
    coders: tuple[Coder, Coder],
    known: _Known,
    model: _Model,
    number: int,
    band: BandLayout,
    key: tuple,
    values: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes a grid at a level, with a coder for the mask and one for the values.

    Returns:
        Values (C, B, d, h, w) int32 and mask.
    """
    of_mask, of_values = coders
    shape = _five(band.shape)
    if 0 < band.num_kept < band.count:
        context = known.contexts(number, shape, key)
        mask = _code_mask(of_mask, context, model.weights, mask, shape[0])
    else:
        mask = np.full(shape, band.num_kept > 0)
    values = _code_values(of_values, model, mask, values)
    known.add(number, values, mask, key)
    return values, mask


def decode_levels(
    take: Callable[[SectionType, int], Reader], layout: Layout, num_levels: int, budget: Budget
) -> list[list[Band]]:
    """The bands of the first levels, grid by grid, from the sections that ``take`` hands out.

    Raises:
        CodecError: if a section is missing or damaged, or the size limit is reached.
    """
    known, limit, num_channels = _Known(), largest_value(layout.bits), 0
    bands: list[list[Band]] = [[] for _ in layout.grids]
    for level in range(num_levels):
        layouts = layout.at_level(level)
        reader = take(SectionType.COEFFICIENTS, level)
        num_channels = _count_channels(layouts, num_channels, reader.where)
        count = sum(band.count for _, band in layouts)
        families, keys, num_bytes = list(_families(layouts)), _keys(layouts), reader.num_left
        models = [_Model.read(reader) for _ in families]
        masked = sum(band.count for _, band in layouts if 0 < band.num_kept < band.count)
        kept = sum(
            band.num_kept
            for family, model in zip(families, models, strict=True)
            for _, band in family
            if model.numbers.more
        )
        expect_room(reader, num_bytes, masked + kept)
        budget.spend(BYTES_PER_COEFFICIENT * count, reader.where)
        decoder = Decoder(reader)
        known.begin_level()
        for family, model in zip(families, models, strict=True):
            for number, band in family:
                coders = decoder, decoder
                values, mask = _code_grid(coders, known, model, number, band, keys[number])
                name = layout.grids[number].name
                if (num_kept := int(np.count_nonzero(mask))) != band.num_kept:
                    raise reader.error(
                        f"{name!r} keeps {num_kept} coefficients, {band.num_kept} declared"
                    )
                if values.size and np.abs(values).max() > limit:
                    raise reader.error(f"{name!r} has a value beyond ±{limit}")
                bands[number].append(
                    Band(
                        level=level,
                        values=values.astype(np.int16).reshape(band.shape),
                        mask=mask.reshape(band.shape),
                        step=band.step,
                    )
                )
        decoder.finish()
    return bands


def _fit(known: _Known, members: Sequence[_Member], keys: dict[int, tuple]) -> _Model:
    """The model that suits a family at a level."""
    kept_values = [values[mask] for _, _, values, mask in members]
    numbers = NumberModel.fit(np.concatenate(kept_values))
    agree = [0, 0]
    for _, _, values, _ in members:
        signs = np.sign(values).astype(np.int32)
        black = chessboard(*signs.shape[2:])
        expected = np.sign(contexts.beside(np.where(black, 0, signs)))
        known_signs = black & (signs != 0) & (expected != 0)
        agree[0] += int((signs == expected)[known_signs].sum())
        agree[1] += int((signs != expected)[known_signs].sum())
    weights = _fit_weights(known, members, keys)
    return _Model(weights, numbers, logit_of(*agree))


def _fit_weights(
    known: _Known, members: Sequence[_Member], keys: dict[int, tuple]
) -> tuple[int, ...]:
    chosen = [
        (number, band, mask) for number, band, _, mask in members if 0 < band.num_kept < band.count
    ]
    if not chosen:
        return (0,) * NUM_WEIGHTS
    num_kept = sum(band.num_kept for _, band, _ in chosen)
    num_dropped = sum(band.count for _, band, _ in chosen) - num_kept
    every_kept, every_dropped = (max(1, n // _SAMPLES) for n in (num_kept, num_dropped))
    # Where there is plenty, whole channels are left out: features are made for a channel at once.
    every_channel = min(every_kept, every_dropped, _MOST_APART)
    every_kept, every_dropped = every_kept // every_channel, every_dropped // every_channel
    samples, kept, turn = [], [], 0
    for number, band, mask in chosen:
        context = known.contexts(number, _five(band.shape), keys[number])
        black = np.broadcast_to(chessboard(*context.size[1:]), context.size)
        regular = np.arange(math.prod(context.size)).reshape(context.size)
        for c, channel in enumerate(mask):
            turn += 1
            if turn % every_channel:
                context.advance(channel)
                continue
            of_dropped = (regular + c) % every_dropped == 0
            of_kept = (regular + c) % every_kept == 0
            where = np.nonzero(np.where(channel, of_kept, of_dropped))
            features = [
                np.broadcast_to(context.refined(f) if is_coarse else f, context.size)[where]
                for f, is_coarse in context.features()
            ]
            white = np.where(black, False, channel)
            last = [np.where(black, feature, 0)[where] for feature in context.of_black(white)]
            features += [np.zeros_like(last[0])] * (NUM_WEIGHTS - len(features) - len(last))
            samples.append(np.stack((*features, *last)))
            kept.append(channel[where])
            context.advance(channel)
    kept_or_not = np.concatenate(kept)
    counts = np.where(kept_or_not, float(every_kept), float(every_dropped))
    return tuple(contexts.fit_weights(np.concatenate(samples, axis=1), kept_or_not, counts))
