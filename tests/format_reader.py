"""A reader of `.mwnf` files, written from `export/FORMAT.md` alone: slow, and as plain as can be.

It shares nothing with the codec, so that what both read is what the document says. A file becomes
dictionaries, nested lists and numbers; names and order follow the document.
"""

from __future__ import annotations

import json
import lzma
import math
import struct
import zlib

PAPER, RANGE = 1, 2
META, CAMERAS, NETWORKS, OCCUPANCY, GRIDS, MASK, VALUES = range(1, 8)
COEFFICIENTS, CODED_NETWORKS, CODED_OCCUPANCY, CODED_CAMERAS = range(8, 12)
LEVELS = (MASK, VALUES, COEFFICIENTS)


def check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


# ---------------------------------------------------------------- fields


class Fields:
    """The fields of a payload, from its start to its end."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        check(self.at + count <= len(self.data), "the data ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def end(self) -> None:
        check(self.at == len(self.data), "something is left over")

    def numbers(self, layout: str) -> tuple:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def u8(self) -> int:
        return self.numbers("B")[0]

    def floats(self, count: int) -> list[float]:
        check(4 * count <= len(self.data) - self.at, "the data ends too early")
        return list(self.numbers(f"{count}f"))

    def step(self) -> float:
        step = self.numbers("f")[0]
        check(math.isfinite(step), "a step is not finite")
        check(math.copysign(1, step) > 0, "a step has a sign")
        return step

    def varint(self) -> int:
        value = 0
        for place in range(9):
            byte = self.u8()
            value += (byte & 127) << (7 * place)
            if byte < 128:
                check(byte > 0 or place == 0, "a varint is longer than needed")
                return value
        raise ValueError("a varint has more than nine bytes")

    def name(self) -> str:
        return self.take(self.varint()).decode("utf-8")

    def shape(self) -> list[int]:
        dimensions = self.u8()
        check(dimensions <= 32, "more than 32 dimensions")
        return [self.varint() for _ in range(dimensions)]

    def block(self, length: int) -> bytes:
        method, data = self.u8(), self.rest()
        if method == 1:
            filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**20}]
            stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
            try:
                packed, data = data, stream.decompress(data)
            except lzma.LZMAError as error:
                raise ValueError("a block does not unpack") from error
            check(stream.eof and not stream.unused_data, f"{len(packed)} bytes are no block")
        else:
            check(method == 0, "an unknown method of a block")
        check(len(data) == length, "a block has another length")
        return data


def bits_of(data: bytes) -> list[int]:
    """From the top bit of each byte down."""
    return [byte >> place & 1 for byte in data for place in range(7, -1, -1)]


def product(lengths: list[int]) -> int:
    return math.prod(lengths)


def nested(flat: list, shape: list[int]):
    """Numbers in C order as lists of lists."""
    if not shape:
        return flat[0]
    size = product(shape[1:])
    return [nested(flat[size * k : size * (k + 1)], shape[1:]) for k in range(shape[0])]


# ---------------------------------------------------------------- frame


def read_sections(data: bytes) -> tuple[int, dict, bool]:
    """The profile, the payload of each known (type, index), and whether sections are missing."""
    file = Fields(data)
    magic, major, _, profile, count = file.numbers("8sHHHH")
    check(magic == b"\x89MWNF\r\n\x1a", "this is another kind of file")
    check(major == 1, "another version of the format")
    check(file.numbers("I")[0] == zlib.crc32(data[:16]), "the header's checksum differs")
    check(profile in (PAPER, RANGE), "an unknown profile")
    sections = {}
    seen = set()
    while len(seen) < count and file.at < len(data):
        start = file.at
        kind, flags, index, length = file.numbers("HBBI")
        crc = file.numbers("I")[0]
        payload = file.take(length)
        check(zlib.crc32(data[start : start + 8] + payload) == crc, "a section's checksum differs")
        check((kind, index) not in seen, "a section comes twice")
        seen.add((kind, index))
        if META <= kind <= CODED_CAMERAS:
            check(flags in (0, 1), "an unknown flag")
            sections[kind, index] = payload
        else:
            check(not flags & 1, "an unknown section is required")
    file.end()
    return profile, sections, len(seen) < count


def decode(data: bytes) -> dict:
    """A whole file, or a prefix of one that ends between two sections."""
    profile, sections, is_prefix = read_sections(data)
    paper = profile == PAPER
    check((META, 0) in sections, "meta is missing")
    check((GRIDS, 0) in sections, "the grids are missing")
    check((NETWORKS if paper else CODED_NETWORKS, 0) in sections, "the networks are missing")
    scene = {"profile": "paper" if paper else "range", "cameras": None, "occupancy": None}
    scene["meta"] = read_meta(Fields(sections[META, 0]))
    scene["bits"], scene["grids"] = read_grids(Fields(sections[GRIDS, 0]))
    if (CAMERAS, 0) in sections:
        scene["cameras"] = read_cameras(Fields(sections[CAMERAS, 0]))
        check((CODED_CAMERAS, 0) not in sections, "cameras come twice")
    elif (CODED_CAMERAS, 0) in sections:
        scene["cameras"] = read_coded_cameras(Fields(sections[CODED_CAMERAS, 0]))
    if paper:
        scene["networks"] = read_networks(Fields(sections[NETWORKS, 0]))
        if (OCCUPANCY, 0) in sections:
            scene["occupancy"] = read_occupancy(Fields(sections[OCCUPANCY, 0]))
    else:
        scene["networks"] = read_coded_networks(Fields(sections[CODED_NETWORKS, 0]))
        if (CODED_OCCUPANCY, 0) in sections:
            scene["occupancy"] = read_coded_occupancy(Fields(sections[CODED_OCCUPANCY, 0]))
    levels = max((len(grid["bands"]) for grid in scene["grids"]), default=0)
    own = {META: 1, CAMERAS: 1, GRIDS: 1}
    own |= {NETWORKS: 1, OCCUPANCY: 1} if paper else {CODED_NETWORKS: 1, CODED_OCCUPANCY: 1}
    own |= {} if paper else {CODED_CAMERAS: 1}
    own |= {MASK: levels, VALUES: levels} if paper else {COEFFICIENTS: levels}
    for kind, index in sections:
        check(index < own.get(kind, 0), "a section that this file has no use for")
    for level in range(levels):
        there = all((kind, level) in sections for kind in own if kind in LEVELS)
        check(there or (is_prefix and level > 0), "a level is missing")
        if not there:
            break
        if paper:
            bands = [grid["bands"][level] for grid in scene["grids"] if level < len(grid["bands"])]
            read_mask(Fields(sections[MASK, level]), bands)
            read_values(Fields(sections[VALUES, level]), bands, scene["bits"])
        else:
            read_coefficients(Fields(sections[COEFFICIENTS, level]), level, scene)
    return scene


# ---------------------------------------------------------------- sections with own fields


def unique(pairs: list) -> dict:
    check(len(dict(pairs)) == len(pairs), "a key or a name comes twice")
    return dict(pairs)


def no_constant(name: str):
    raise ValueError(f"{name} is no number")


def read_meta(fields: Fields) -> dict:
    length = fields.varint()
    check(length <= 2**20, "the text is too long")
    text = fields.block(length).decode("utf-8")
    meta = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    check(isinstance(meta, dict), "meta is no object")
    return meta


def read_cameras(fields: Fields) -> list[dict]:
    cameras = []
    for record in read_records(fields, 101):
        pose = nested(list(record.numbers("12f")), [3, 4])
        cameras.append({"camera_to_world": pose, **read_lens(record)})
    return cameras


def read_coded_cameras(fields: Fields) -> list[dict]:
    exponent = fields.u8() - 128
    cameras = []
    for record in read_records(fields, 77):
        numbers = [u // 2 if u % 2 == 0 else -(u + 1) // 2 for u in record.numbers("6I")]
        turn, place = numbers[:3], numbers[3:]
        check(all(abs(k) <= 2**19 for k in turn), "a turn is out of range")
        check(all(abs(k) <= 2**18 for k in place), "a place is out of range")
        p = [k / 2**19 for k in turn]
        s = p[0] ** 2 + p[1] ** 2 + p[2] ** 2
        w, x, y, z = 1 - s, 2 * p[0], 2 * p[1], 2 * p[2]
        rotation = [
            [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
        ]
        pose = [
            [f32(entry / (1 + s) ** 2) for entry in row] + [f32(k * 2.0 ** (exponent - 18))]
            for row, k in zip(rotation, place, strict=True)
        ]
        cameras.append({"camera_to_world": pose, **read_lens(record)})
    return cameras


def f32(number: float) -> float:
    return struct.unpack("<f", struct.pack("<f", number))[0] or 0.0


def read_records(fields: Fields, size: int) -> list[Fields]:
    count = fields.varint()
    planes = fields.block(size * count)
    return [Fields(bytes(planes[byte * count + n] for byte in range(size))) for n in range(count)]


def read_lens(record: Fields) -> dict:
    lens: dict = dict(zip(("fx", "fy", "cx", "cy"), record.numbers("4f"), strict=True))
    lens["width"], lens["height"] = record.numbers("2i")
    lens["distortion"] = list(record.numbers("6f"))
    lens["camera_type"], lens["split"] = record.numbers("iB")
    record.end()
    check(lens["split"] in (0, 1), "a camera is of no split")
    return lens


def read_networks(fields: Fields) -> dict:
    arrays = []
    for _ in range(fields.varint()):
        name = fields.name()
        arrays.append((name, {"shape": fields.shape(), "step": None}))
    for _, array in arrays:
        numbers = fields.floats(product(array["shape"]))
        array["values"] = nested(numbers, array["shape"])
    fields.end()
    return unique(arrays)


def read_occupancy(fields: Fields) -> list:
    shape = [fields.varint() for _ in "XYZ"]
    count = product(shape)
    bits = bits_of(fields.block(-(-count // 8)))
    check(not any(bits[count:]), "a bit after the last voxel")
    return nested([bit == 1 for bit in bits[:count]], shape)


def zeros(channels: int, bands: int, d: int, h: int, w: int, zero) -> list:
    return [
        [[[[zero] * w for _ in range(h)] for _ in range(d)] for _ in range(bands)]
        for _ in range(channels)
    ]


def read_grids(fields: Fields) -> tuple[int, list[dict]]:
    """The grids, all dropped until their levels are read; planes have d = 1, lines h = 1, too."""
    bits = fields.u8()
    check(2 <= bits <= 16, "so many bits of the quantiser are not allowed")
    grids = []
    for _ in range(fields.varint()):
        name = fields.name()
        dimensions = fields.u8()
        check(dimensions in (1, 2, 3), "neither voxels, nor a plane, nor a line")
        size = [fields.varint() for _ in range(dimensions)]
        channels = fields.varint()
        bands = []
        for level in range(fields.u8()):
            spatial = [fields.varint() for _ in range(dimensions)]
            step, kept = fields.step(), fields.varint()
            d, h, w = [1] * (3 - dimensions) + spatial
            across = 1 if level == 0 else 2**dimensions - 1
            check(kept <= channels * across * d * h * w, "more is kept than there is")
            band = {"level": level, "C": channels, "B": across, "d": d, "h": h, "w": w}
            band |= {"shape": [channels, across, *spatial], "step": step, "kept": kept}
            band["mask"] = zeros(channels, across, d, h, w, False)
            band["values"] = zeros(channels, across, d, h, w, 0)
            bands.append(band)
        grids.append((name, {"name": name, "D": dimensions, "size": size, "bands": bands}))
    fields.end()
    unique(grids)
    return bits, [grid for _, grid in grids]


# ---------------------------------------------------------------- profile `paper`


def places_of(band: dict):
    """In the order (*spatial, C, B)."""
    for k, i, j in places_in(band):
        for c in range(band["C"]):
            for b in range(band["B"]):
                yield c, b, k, i, j


def places_in(band: dict):
    """In the order (d, h, w)."""
    for k in range(band["d"]):
        for i in range(band["h"]):
            for j in range(band["w"]):
                yield k, i, j


def read_symbols(fields: Fields) -> list[int]:
    """Huffman codes."""
    count = fields.varint()
    if count == 0:
        fields.end()
        return []
    occurs = bits_of(fields.take(33))
    check(not any(occurs[258:]), "a bit after the last symbol")
    symbols = [symbol for symbol in range(258) if occurs[symbol]]
    nibbles = bits_of(fields.take(-(-len(symbols) // 2)))
    check(not any(nibbles[4 * len(symbols) :]), "a bit after the last length")
    lengths = []
    for k in range(len(symbols)):
        a, b, c, d = nibbles[4 * k : 4 * k + 4]
        lengths.append(8 * a + 4 * b + 2 * c + d + 1)
    if len(symbols) == 1:
        check(lengths == [1], "a lone symbol has one bit")
    else:
        check(sum(2 ** (16 - length) for length in lengths) == 2**16, "an incomplete code")
    codes = {}
    code, length_before = -1, 0
    for length, symbol in sorted(zip(lengths, symbols, strict=True)):
        code = 0 if not codes else (code + 1) << (length - length_before)
        length_before = length
        codes[length, code] = symbol
    bits = bits_of(fields.rest())
    decoded = []
    at = 0
    while len(decoded) < count:
        length, code = 0, 0
        while (length, code) not in codes:
            check(at < len(bits) and length < 16, "the codes end too early")
            length, code = length + 1, 2 * code + bits[at]
            at += 1
        decoded.append(codes[length, code])
    check(len(bits) - at < 8 and not any(bits[at:]), "something follows the codes")
    return decoded


def read_mask(fields: Fields, bands: list[dict]) -> None:
    total = sum(product(band["shape"]) for band in bands)
    packed = -(-total // 8)
    symbols = read_symbols(fields)
    check(len(symbols) <= packed, "more symbols than bytes")
    data = []
    run, digit = 0, 1
    for symbol in [*symbols, None]:
        if symbol in (256, 257):
            run += (symbol - 255) * digit
            digit *= 2
            check(run <= packed, "a run is too long")
        else:
            data += [0] * run
            run, digit = 0, 1
            if symbol is not None:
                check(symbol > 0, "the symbol 0")
                data.append(symbol)
    check(len(data) == packed, "the runs have another length")
    bits = bits_of(bytes(data))
    check(not any(bits[total:]), "a bit after the last coefficient")
    at = 0
    for band in bands:
        count = product(band["shape"])
        check(sum(bits[at : at + count]) == band["kept"], "another number is kept")
        for c, b, k, i, j in places_of(band):
            band["mask"][c][b][k][i][j] = bits[at] == 1
            at += 1


def read_values(fields: Fields, bands: list[dict], bits: int) -> None:
    for band in bands:
        for c, b, k, i, j in places_of(band):
            if band["mask"][c][b][k][i][j]:
                value = fields.numbers("b" if bits <= 8 else "h")[0]
                check(abs(value) <= 2 ** (bits - 1) - 1, "a value is beyond the quantiser's")
                band["values"][c][b][k][i][j] = value
    fields.end()


# ---------------------------------------------------------------- profile `range`: decisions


def weight_of_logit(logit: int) -> int:
    return min(max(round(65536 / (1 + math.exp((256 - logit) / 16))), 16), 65520)


WEIGHTS = [weight_of_logit(logit) for logit in range(512)]
EVEN = 256


class Decisions:
    """Asymmetric numeral systems: words to decisions."""

    def __init__(self, data: bytes):
        check(len(data) % 4 == 0, "no whole number of words")
        self.words = list(struct.unpack(f"<{len(data) // 4}I", data))
        check(not self.words or self.words[-1] != 0, "the last word is zero")
        self.state = 2**24
        if self.words:
            self.state = self.words.pop()
        if self.words:
            self.state = self.state * 2**32 + self.words.pop()

    def at_weight(self, weight: int) -> bool:
        f = (65536 - weight) * (2**24 - 2) // 65536 + 1
        q = self.state % 2**24
        yes = q >= f
        n, s = (2**24 - f, f) if yes else (f, 0)
        self.state = self.state // 2**24 * n + q - s
        if self.state < 2**32 and self.words:
            self.state = self.state * 2**32 + self.words.pop()
        return yes

    def at_logit(self, logit: int) -> bool:
        return self.at_weight(WEIGHTS[logit])

    def end(self) -> None:
        check(self.state == 2**24 and not self.words, "decisions are left over")


def check_room(count: int, num_bytes: int) -> None:
    check(count <= (num_bytes + 8) * 2**15, "so few bytes do not hold so many decisions")


def read_logit(fields: Fields) -> int:
    return 2 * fields.u8()


def read_model(fields: Fields) -> dict:
    largest = fields.u8()
    check(largest <= 15, "a class above 15")
    more = [read_logit(fields) for _ in range(largest)]
    below_top = {c: read_logit(fields) for c in range(2, largest + 1)}
    return {"K": largest, "more": more, "below_top": below_top}


def read_magnitudes(decisions: Decisions, model: dict, count: int) -> list[int]:
    classes = [0] * count
    for k in range(model["K"]):
        for n in range(count):
            if classes[n] == k and decisions.at_logit(model["more"][k]):
                classes[n] = k + 1
    magnitudes = [0 if c == 0 else 2 ** (c - 1) for c in classes]
    for k in range(2, model["K"] + 1):
        for n in range(count):
            c = classes[n]
            if c >= k and decisions.at_logit(model["below_top"][c] if k == 2 else EVEN):
                magnitudes[n] += 2 ** (c - k)
    return magnitudes


# ---------------------------------------------------------------- profile `range`: sections


def read_coded_networks(fields: Fields) -> dict:
    arrays = []
    for _ in range(fields.varint()):
        array = {"name": fields.name(), "shape": fields.shape(), "kind": fields.u8()}
        check(array["kind"] in (0, 1), "an unknown kind of array")
        arrays.append(array)
    for array in arrays:
        array["step"] = None
        if array["kind"] == 1:
            array["step"], array["model"] = fields.step(), read_model(fields)
    for array in arrays:
        if array["kind"] == 0:
            numbers = fields.floats(product(array["shape"]))
            array["values"] = nested(numbers, array["shape"])
    words = fields.rest()
    coded = [array for array in arrays if array["kind"] == 1 and array["model"]["K"] > 0]
    check_room(sum(product(array["shape"]) for array in coded), len(words))
    decisions = Decisions(words)
    for array in arrays:
        if array["kind"] == 1:
            numbers = read_magnitudes(decisions, array["model"], product(array["shape"]))
            for n in range(len(numbers)):
                if numbers[n] != 0 and not decisions.at_logit(EVEN):
                    numbers[n] = -numbers[n]
            array["values"] = nested(numbers, array["shape"])
    decisions.end()
    return unique(
        [(a["name"], {key: a[key] for key in ("shape", "step", "values")}) for a in arrays]
    )


def read_coded_occupancy(fields: Fields) -> list:
    X, Y, Z = (fields.varint() for _ in "XYZ")
    words = fields.rest()
    check_room(X * Y * Z, len(words))
    decisions = Decisions(words)
    occupied = {}  # (x, y, z) of voxels that are known; others are outside or still to come
    voxels = [(x, y, z) for x in range(X) for y in range(Y) for z in range(Z)]
    voxels.sort(key=lambda v: (3 * v[0] + 2 * v[1] + v[2], 3 * v[0] + 2 * v[1], v[0]))
    every, yes = [0] * 512, [0] * 512
    waiting = []  # (context, occupied) of the voxels with the same 3x + 2y + z
    front = 0
    for x, y, z in voxels:
        if 3 * x + 2 * y + z != front:
            for context, is_occupied in waiting:
                every[context] += 1
                yes[context] += is_occupied
            waiting, front = [], 3 * x + 2 * y + z
        beside = [
            (x - 1, y, z),
            (x, y - 1, z),
            (x, y, z - 1),
            (x - 1, y - 1, z),
            (x - 1, y, z - 1),
            (x, y - 1, z - 1),
            (x, y - 1, z + 1),
            (x - 1, y + 1, z),
            (x - 1, y, z + 1),
        ]
        context = sum(2**k * occupied.get(beside[k], False) for k in range(9))
        weight = 65536 * (5 * yes[context] + 2) // (5 * every[context] + 4)
        occupied[x, y, z] = decisions.at_weight(min(max(weight, 16), 65520))
        waiting.append((context, occupied[x, y, z]))
    decisions.end()
    return [[[occupied[x, y, z] for z in range(Z)] for y in range(Y)] for x in range(X)]


def exact_log(n: int) -> int:
    """L(n): the largest k with 2^k <= (4 min(n, 4095) + 1)^16."""
    return ((4 * min(n, 4095) + 1) ** 16).bit_length() - 1


LOGS = [exact_log(n) for n in range(4096)]


def L(n: int) -> int:
    return LOGS[min(n, 4095)]


def read_signed(fields: Fields) -> int:
    u = fields.varint()
    w = u // 2 if u % 2 == 0 else -(u + 1) // 2
    check(abs(w) <= 16384, "a weight is too large")
    return w


def read_families(fields: Fields, level: int, grids: list[dict]) -> list[dict]:
    families = []
    for grid in grids:
        if level < len(grid["bands"]):
            kind = (grid["D"], grid["bands"][level]["C"])
            if not families or families[-1]["kind"] != kind:
                families.append({"kind": kind, "grids": []})
            families[-1]["grids"].append(grid)
    for family in families:
        family["weights"] = [read_signed(fields) for _ in range(12)]
        family["model"] = read_model(fields)
        family["equal_signs"] = read_logit(fields)
    return families


def read_coefficients(fields: Fields, level: int, scene: dict) -> None:
    bands = [grid["bands"][level] for grid in scene["grids"] if level < len(grid["bands"])]
    counts = [(band["kept"], product(band["shape"])) for band in bands]
    check_room(sum(count for kept, count in counts if 0 < kept < count), len(fields.data))
    families = read_families(fields, level, scene["grids"])
    decisions = Decisions(fields.rest())
    earlier = []  # (dimensions, position within the family, band) of the families before
    for family in families:
        for position, grid in enumerate(family["grids"]):
            band = grid["bands"][level]
            alike = [
                other
                for dimensions, place, other in earlier
                if dimensions == grid["D"]
                and place == position
                and other["shape"][1:] == band["shape"][1:]
            ]
            read_band_mask(decisions, grid, level, family["weights"], alike)
            read_band_values(decisions, band, family)
        for position, grid in enumerate(family["grids"]):
            earlier.append((grid["D"], position, grid["bands"][level]))
    decisions.end()
    limit = 2 ** (scene["bits"] - 1) - 1
    for band in bands:
        for c, b, k, i, j in places_of(band):
            check(abs(band["values"][c][b][k][i][j]) <= limit, "a value is beyond the quantiser's")


def amounts_of(band: dict) -> list:
    """The numbers a of features 6 to 9."""
    amounts = zeros(*(band[key] for key in "CBdhw"), 0)
    for c, b, k, i, j in places_of(band):
        if band["mask"][c][b][k][i][j]:
            amounts[c][b][k][i][j] = abs(band["values"][c][b][k][i][j]).bit_length() + 1
    return amounts


def read_band_mask(
    decisions: Decisions, grid: dict, level: int, weights: list[int], alike: list[dict]
) -> None:
    band = grid["bands"][level]
    mask, kept = band["mask"], band["kept"]
    C, B, d, h, w = (band[key] for key in "CBdhw")
    if kept in (0, C * B * d * h * w):
        for c, b, k, i, j in places_of(band):
            mask[c][b][k][i][j] = kept > 0
        return
    before = zeros(1, B, d, h, w, 0)[0]  # s
    for other in alike:
        for c, b, k, i, j in places_of(other):
            before[b][k][i][j] += other["mask"][c][b][k][i][j]
    coarser = grid["bands"][level - 1] if level > 0 else None
    if coarser is not None and product(coarser["shape"]) == 0:
        coarser = None
    if coarser is not None:
        B_, d_, h_, w_ = (coarser[key] for key in "Bdhw")
        amounts = amounts_of(coarser)
    p = zeros(1, B, d, h, w, 0)[0]
    for c in range(C):
        if coarser is not None:
            survivors = sum(
                amounts[c][b][k][i][j] > 0 for b in range(B_) for k, i, j in places_in(coarser)
            )
        for black in (False, True):
            for b in range(B):
                for k, i, j in places_in(band):
                    if ((k + i + j) % 2 == 1) != black:
                        continue
                    x = [0] * 12
                    x[0] = 16
                    P = sum(p[band_][k][i][j] for band_ in range(B))
                    Q = around(p[b], k, i, j)
                    x[1] = L(p[b][k][i][j]) - L(c) - 32
                    x[2] = L(P) - L(c) - 32
                    x[3] = L(Q) - L(c) - 32
                    x[4] = L(before[b][k][i][j])
                    x[5] = L(sum(before[band_][k][i][j] for band_ in range(B)))
                    if coarser is not None:
                        above = amounts[c][b if B_ > 1 else 0]
                        at = k * d_ // d, i * h_ // h, j * w_ // w
                        amount = above[at[0]][at[1]][at[2]]
                        x[6] = 16 * amount
                        x[7] = 16 if amount != 0 else 0
                        x[8] = 16 * around(above, *at)
                        x[9] = L(B // B_ * survivors)
                    if black:
                        x[10] = 16 * sum(beside(mask[c][b], k, i, j))
                        x[11] = 16
                    total = sum(weights[n] * x[n] for n in range(12))
                    logit = min(max(256 + (total + 64) // 128, 0), 511)
                    mask[c][b][k][i][j] = decisions.at_logit(logit)
        for b in range(B):
            for k, i, j in places_in(band):
                p[b][k][i][j] += mask[c][b][k][i][j]
    found = sum(mask[c][b][k][i][j] for c, b, k, i, j in places_of(band))
    check(found == kept, "another number is kept")


def at_places(voxels: list, places: list) -> list:
    """The values at those places that are not outside."""
    d, h, w = len(voxels), len(voxels[0]), len(voxels[0][0])
    return [voxels[k][i][j] for k, i, j in places if 0 <= k < d and 0 <= i < h and 0 <= j < w]


def around(voxels: list, k: int, i: int, j: int) -> int:
    """The sum over a place and its neighbours, diagonal ones too; there is nothing outside."""
    near = (-1, 0, 1)
    places = [(k + a, i + b, j + c) for a in near for b in near for c in near]
    return sum(at_places(voxels, places))


def beside(voxels: list, k: int, i: int, j: int) -> list:
    """What is next to a place along each axis."""
    near = (-1, 1)
    places = [(k + a, i, j) for a in near]
    places += [(k, i + a, j) for a in near]
    places += [(k, i, j + a) for a in near]
    return at_places(voxels, places)


def read_band_values(decisions: Decisions, band: dict, family: dict) -> None:
    mask, values = band["mask"], band["values"]
    for black in (False, True):
        places = []
        for c in range(band["C"]):
            for b in range(band["B"]):
                for k, i, j in places_in(band):
                    if ((k + i + j) % 2 == 1) == black and mask[c][b][k][i][j]:
                        places.append((c, b, k, i, j))
        magnitudes = read_magnitudes(decisions, family["model"], len(places))
        for (c, b, k, i, j), magnitude in zip(places, magnitudes, strict=True):
            if magnitude == 0:
                continue
            e = 0
            if black:
                e = sum((v > 0) - (v < 0) for v in beside(values[c][b], k, i, j))
            if e == 0:
                positive = decisions.at_logit(EVEN)
            else:
                positive = decisions.at_logit(family["equal_signs"]) == (e > 0)
            values[c][b][k][i][j] = magnitude if positive else -magnitude
