"""The entropy coder against theory, and against a decoder written from FORMAT.md alone."""

from __future__ import annotations

import heapq
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec_scenes import make_scene

import masked_wavelet_codec as codec
from masked_wavelet_codec import container, huffman, runlength
from masked_wavelet_codec.binary import Reader, Writer


def write(symbols, alphabet=258) -> bytes:
    writer = Writer()
    huffman.write_symbols(writer, np.asarray(symbols, np.uint16), alphabet)
    return writer.getvalue()


def read(data, alphabet=258, max_symbols=10**9) -> np.ndarray:
    return huffman.read_symbols(Reader(data, "test"), alphabet, max_symbols)


def reference_symbols(data: bytes, alphabet: int = 258) -> list[int]:
    """Bit by bit, with strings: slow, and nothing of the package is used."""
    count = shift = position = 0
    while True:
        byte = data[position]
        position += 1
        count |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if count == 0:
        return []
    text = "".join(f"{byte:08b}" for byte in data[position:])
    used = [symbol for symbol in range(alphabet) if text[symbol] == "1"]
    text = text[-(-alphabet // 8) * 8 :]
    lengths = {s: int(text[4 * i : 4 * i + 4], 2) + 1 for i, s in enumerate(used)}
    text = text[-(-len(used) // 2) * 8 :]
    table, code, length = {}, -1, 0
    for symbol in sorted(used, key=lambda s: (lengths[s], s)):
        code = (code + 1) << (lengths[symbol] - length)
        length = lengths[symbol]
        table[f"{code:0{length}b}"] = symbol
    symbols, start, end = [], 0, 0
    while len(symbols) < count:
        end += 1
        if text[start:end] in table:
            symbols.append(table[text[start:end]])
            start = end
    return symbols


def reference_bytes(symbols: list[int]) -> bytes:
    """Undo the run lengths one symbol at a time."""
    data, weight = bytearray(), 1
    for symbol in symbols:
        if symbol < 256:
            data.append(symbol)
            weight = 1
        else:
            data += bytes(weight * (symbol - 255))
            weight *= 2
    return bytes(data)


def optimal_bits(counts) -> int:
    """Length of a Huffman code without a limit, by merging the two rarest."""
    heap, total = [int(count) for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, merged)
        total += merged
    return total


def kraft(lengths) -> float:
    return sum(2.0**-n for n in lengths.tolist() if n)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=60))
def test_lengths_are_a_complete_code_within_one_bit_of_the_entropy(counts):
    counts = np.array(counts)
    lengths = huffman.code_lengths(counts, max_length=60)
    assert np.array_equal(lengths > 0, counts > 0)
    if np.count_nonzero(counts) < 2:
        return
    assert kraft(lengths) == 1
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    mean = (p * lengths[counts > 0]).sum()
    assert entropy - 1e-9 <= mean < entropy + 1
    assert int((counts * lengths).sum()) == optimal_bits(counts)


def test_limit_of_16_bits_holds_and_costs_little():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    counts = np.array(fibonacci)
    assert huffman.code_lengths(counts, max_length=60).max() == 39
    lengths = huffman.code_lengths(counts)
    assert lengths.max() == 16
    assert kraft(lengths) == 1
    assert (counts * lengths).sum() < 1.001 * optimal_bits(counts)


def test_limit_is_reached_exactly_by_a_full_tree():
    assert (huffman.code_lengths(np.ones(2**8, int), max_length=8) == 8).all()


def test_fixed_codes_by_hand():
    # Counts 4, 2, 1, 1 of the symbols 5, 7, 8, 9 give the codes 0, 10, 110, 111.
    symbols = [5, 5, 5, 5, 7, 7, 8, 9]
    data = write(symbols, alphabet=10)
    bits = "0000" + "1010" + "110" + "111"
    expected = bytes([8, 0b00000101, 0b11000000, 0x01, 0x22])
    expected += int(bits.ljust(16, "0"), 2).to_bytes(2, "big")
    assert data == expected
    assert read(data, alphabet=10).tolist() == symbols


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
@pytest.mark.parametrize("symbol", [0, 255, 257])
def test_one_symbol_and_empty_input(count, symbol):
    data = write([symbol] * count)
    assert read(data).tolist() == [symbol] * count == reference_symbols(data)


def test_all_lengths_from_1_to_16_against_the_reference():
    symbols = np.repeat(np.arange(18), [2**n for n in range(17, -1, -1)])[::7]
    symbols = np.random.default_rng(0).permutation(np.append(symbols, np.arange(18)))
    lengths = huffman.code_lengths(np.bincount(symbols))
    assert lengths.min() == 1 and lengths.max() == 16
    data = write(symbols)
    assert np.array_equal(read(data), symbols)
    assert reference_symbols(data) == symbols.tolist()


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300)
    | st.lists(st.sampled_from([0] * 30 + [255, 3]), max_size=900).map(bytes)
)
def test_run_lengths_and_huffman_against_the_reference(data):
    symbols = runlength.to_symbols(np.frombuffer(data, np.uint8))
    coded = write(symbols)
    assert reference_symbols(coded) == symbols.tolist()
    assert reference_bytes(symbols.tolist()) == data
    decoded = runlength.from_symbols(Reader(b"", "test"), read(coded), len(data))
    assert decoded.tobytes() == data


@pytest.mark.parametrize("run", [1, 2, 3, 4, 6, 7, 8, 100, 2**20 - 1, 2**20, 2**20 + 1])
def test_runs_around_powers_of_two(run):
    data = np.zeros(run + 2, np.uint8)
    data[[0, -1]] = 9
    symbols = runlength.to_symbols(data)
    assert len(symbols) == 2 + (run + 1).bit_length() - 1
    decoded = runlength.from_symbols(Reader(b"", "test"), symbols, len(data))
    assert np.array_equal(decoded, data)


@pytest.mark.parametrize(
    ("symbols", "num_bytes", "match"),
    [
        ([0, 1], 2, "zero byte outside"),
        ([5, 5], 3, "do not give the 3 bytes"),
        ([5, 5, 5], 2, "do not give the 2 bytes"),
        ([257] * 60, 100, "a run of more than the 100 bytes"),
        ([257] * 40 + [5], 2**40, "do not give"),
    ],
)
def test_run_lengths_that_do_not_fit(symbols, num_bytes, match):
    with pytest.raises(codec.CodecError, match=match):
        runlength.from_symbols(Reader(b"", "test"), np.array(symbols, np.uint16), num_bytes)


def test_run_lengths_whose_sum_wraps_around_to_the_right_number():
    # Four runs of 2^62 - 2 and one of 2^60 + 3, a byte after each: 2^64 + 2^60 in all.
    num_bytes = 2**60
    symbols = [*[257] * 61, 5] * 4 + [256 + (4 >> place & 1) for place in range(60)] + [5]
    symbols = np.array(symbols, np.uint16)
    with pytest.raises(codec.CodecError, match=f"do not give the {num_bytes} bytes"):
        runlength.from_symbols(Reader(b"", "test"), symbols, num_bytes)


def table(used: dict[int, int], alphabet: int = 10) -> bytes:
    """A code table with these lengths."""
    bitmap = sum(1 << (15 - symbol) for symbol in used).to_bytes(-(-alphabet // 8), "big")
    nibbles = "".join(f"{used[s] - 1:x}" for s in sorted(used))
    return bitmap + bytes.fromhex(nibbles + "0" * (len(nibbles) % 2))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "truncated"),
        (b"\x00\x00", "1 bytes too many"),
        (b"\x05", "truncated"),
        (b"\x01" + bytes(2), "no symbol, or one outside"),
        (b"\x01\x00\x01\x00\x00", "no symbol, or one outside"),
        (b"\x02" + table({1: 1, 2: 2}) + b"\0", "not a complete code"),
        (b"\x02" + table({1: 1, 2: 1, 3: 1}) + b"\0", "not a complete code"),
        (b"\x02" + table({1: 2}) + b"\0", "not a complete code"),
        (b"\x01\x40\x00\x01\x00", "unused bits are not zero"),
        (b"\x09" + table({1: 1, 2: 1}) + b"\0", "9 symbols declared"),
        (b"\x80\x80\x80\x80\x80\x80\x80\x80\x10" + table({1: 1, 2: 1}) + b"\0", "declared"),
        (b"\x81\x00", "longer than needed"),
        (b"\x80" * 9, "more than 9 bytes"),
        (b"\x05" + table({1: 1, 2: 2, 3: 2}) + b"\xff", "of 5 symbols|10 bits"),
        (b"\x02" + table({1: 1, 2: 1}) + b"\0\0", "2 bits of Huffman codes in 2 bytes"),
        (b"\x02" + table({1: 1, 2: 1}) + b"\x01", "bits after the Huffman codes"),
        (b"\x08" + table({1: 1}) + b"\x80", "not in the Huffman table"),
    ],
)
def test_damaged_streams(data, match):
    with pytest.raises(codec.CodecError, match=match):
        read(data, alphabet=10)


def test_more_symbols_than_the_caller_needs():
    with pytest.raises(codec.CodecError, match="at most 3 are needed"):
        read(write([1, 2, 1, 2]), max_symbols=3)


@pytest.mark.parametrize("bits", [8, 12])
def test_level_sections_against_the_reference(bits):
    scene = make_scene(bits)
    for section in container.parse(codec.encode(scene)).sections:
        bands = [
            grid.bands[section.index] for grid in scene.grids if section.index < len(grid.bands)
        ]
        if section.type_id == container.SectionType.MASK:
            packed = reference_bytes(reference_symbols(bytes(section.payload)))
            coded = "".join(f"{byte:08b}" for byte in packed)
            expected = "".join(
                str(int(band.mask[(c, b, *place)]))
                for band in bands
                for place in np.ndindex(band.mask.shape[2:])
                for c in range(band.mask.shape[0])
                for b in range(band.mask.shape[1])
            )
            assert coded == expected.ljust(len(coded), "0")
            assert len(coded) - len(expected) < 8
        if section.type_id == container.SectionType.VALUES:
            expected = [
                int(band.values[(c, b, *place)])
                for band in bands
                for place in np.ndindex(band.mask.shape[2:])
                for c in range(band.mask.shape[0])
                for b in range(band.mask.shape[1])
                if band.mask[(c, b, *place)]
            ]
            dtype = "<i1" if bits <= 8 else "<i2"
            assert np.frombuffer(section.payload, dtype).tolist() == expected


def test_decoding_300_kb_of_symbols_takes_less_than_3_seconds():
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.03, 330_000) - 1, 257).astype(np.uint16)
    data = write(symbols)
    assert len(data) > 250_000
    start = time.perf_counter()
    decoded = read(data)
    assert time.perf_counter() - start < 3
    assert np.array_equal(decoded, symbols)
