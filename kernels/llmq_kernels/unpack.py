# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""Packed words -> the left operand of a matrix instruction, in registers. Triton.

An OR puts codes under the mantissa of a power of two (bf16: 0x4300 | q = 128 + q, fp16:
0x6400 | q = 1024 + q), so one LOP3 makes two weights and no integer is ever converted. A
multiply-add then takes the zero point away and leaves the exact integer q - z. It may halve as
well: codes of rows 8 to 15 stay `lift` bits above the end of the mantissa, which saves the shift
that would bring them down. Eight bits do not fit under bf16's seven: see `_eight_bits`.
"""

import triton
import triton.language as tl

from . import bitfields
from .grid import centre, lift, minus, scale_of, scale_pair

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
pieces = triton.constexpr_function(bitfields.pieces)
parts = triton.constexpr_function(bitfields.parts)


@triton.constexpr_function
def decode_ptx(bits, bf16, part, symmetric, scaled):
    """PTX: the eight 16-bit weights ($0..$7) of one fragment of an element.

    Output 2 * (half + 2 * h2) + e is code (half, h2, e), minus its zero point, times its scale if
    `scaled`. Inputs: the element's words $8, $9, $10; for half 0 and 1 the pairs that centre
    ($11, $12, see `centre`) and the scales ($13, $14), as pairs of equal 16-bit floats.
    """
    kind, magic = ("bf16x2", 0x43004300) if bf16 else ("f16x2", 0x64006400)
    one = 0x3F80 if bf16 else 0x3C00
    ptx = [".reg .b32 t, a, m, f;"]
    for h2, half in ((0, 0), (0, 1), (1, 0), (1, 1)):
        up = lift(bits, bf16, half)
        centre = f"${11 + half}"
        if symmetric:
            ptx.append(f"mov.b32 m, {minus(1 << (bits - 1), bits, bf16, half) * 0x10001};")
            centre = "m"
        if bits == 8:
            ptx += _eight_bits(f"${8 + h2}", half, bf16, symmetric, centre)
        else:
            place, base = up, magic
            for word, bit, width in pieces(bits, part, h2, half):
                shift = bit - place
                source = "t" if shift else f"${8 + word}"
                if shift:
                    ptx.append(f"shr.u32 t, ${8 + word}, {shift};")
                mask = (((1 << width) - 1) << place) * 0x10001
                ptx.append(f"lop3.b32 a, {source}, {mask}, {base}, 0xEA;")  # (source & mask) | base
                place, base = place + width, "a"
            factor = (one - (up << (7 if bf16 else 10))) * 0x10001
            ptx.append(f"mov.b32 f, {factor};")
            ptx.append(f"fma.rn.{kind} a, a, f, {centre};")
        if scaled:
            ptx.append(f"mov.b32 m, {0x80008000};")
            ptx.append(f"fma.rn.{kind} a, a, ${13 + half}, m;")
        pair = half + 2 * h2
        ptx.append(f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, a;")
    return "{\n" + "\n".join(ptx) + "\n}"


@triton.constexpr_function
def _eight_bits(word, half, bf16, symmetric, centre):
    """PTX that leaves code minus zero point in `a`; `centre` of asymmetric bf16 is 128 - zero.

    fp16: 0x64 above the code's byte is 1024 + q. bf16: 0x43 above it is 128 + q, or from 128 on
    256 + 2 (q - 128); its top bit makes a factor of 1 or 1/2, and (that - 256) * factor = q - 128.
    Without a zero point to add, the difference of 128 + (q & 127) and 256 or 128 is shorter.
    """
    if bf16 and symmetric:
        shifted = [f"shr.u32 t, {word}, 8;"] if half else []
        t = "t" if half else word
        return [
            *shifted,
            f"lop3.b32 a, {t}, {0x007F007F}, {0x43004300}, 0xEA;",
            f"lop3.b32 f, {t}, {0x00800080}, {0x43004300}, 0xAE;",  # (~t & mask) | magic
            f"mov.b32 m, {0xBF80BF80};",
            "fma.rn.bf16x2 a, f, m, a;",
        ]
    high, select = (0x43434343, 0x64646464)[not bf16], 0x4341 if half else 0x4240
    spread = f"prmt.b32 a, {word}, {high}, {select};"
    if not bf16:
        return [spread, f"mov.b32 f, {0x3C003C00};", f"fma.rn.f16x2 a, a, f, {centre};"]
    return [
        spread,
        f"lop3.b32 f, a, {0x00800080}, {0x3F003F00}, 0xAE;",
        f"mov.b32 t, {0x3F803F80};",
        f"mov.b32 m, {0xC380C380};",
        "fma.rn.bf16x2 a, a, t, m;",
        f"fma.rn.bf16x2 a, a, f, {centre};",
    ]


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 -> DTYPE, to nearest even. The interpreter truncates to bf16: there, by the bits."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _number(words, zero, scale, PART: tl.constexpr, H2: tl.constexpr, HALF: tl.constexpr,
            E: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """One output of `decode_ptx` without assembly, for the interpreter: exact, in float32."""
    code, done = words[0] * 0, 0
    for word, bit, width in pieces(BITS, PART, H2, HALF):
        code |= ((words[word] >> (bit + 16 * E)) & ((1 << width) - 1)) << done
        done += width
    value = (code - zero).to(tl.float32)
    return value if scale is None else rounded(value * scale, DTYPE).to(tl.float32)


@triton.jit
def _interpreted(words, lines, g, PART: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
                 SCALED: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """`decode_ptx` for the interpreter: its eight outputs, in float32."""
    z0, z1, s0, s1 = lines
    found = []
    for h2, half in ((0, 0), (0, 1), (1, 0), (1, 1)):
        z, s, scale = (z1, s1, None) if half else (z0, s0, None)
        zero = 2 ** (BITS - 1) if SYMMETRIC else (z >> (g * 8)) & 255
        if SCALED:
            scale = rounded(scale_of(s, g, STORED), DTYPE).to(tl.float32)
        for e in (0, 1):
            found.append(_number(words, zero, scale, PART, h2, half, e, BITS, DTYPE))
    return found


@triton.jit
def _fragment(words, lines, g, PART: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
              SCALED: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Fragment PART of every element: (..., h2, half, e)."""
    if INTERPRETED:
        a0, b0, a1, b1, a2, b2, a3, b3 = _interpreted(
            words, lines, g, PART, BITS, SYMMETRIC, SCALED, STORED, DTYPE
        )
    else:
        w0, w1, w2 = words
        z0, z1, s0, s1 = lines
        c0, c1, f0, f1 = w0, w0, w0, w0  # not read
        if not SYMMETRIC:
            c0, c1 = centre(z0, g, BITS, DTYPE, 0), centre(z1, g, BITS, DTYPE, 1)
        if SCALED:
            f0, f1 = scale_pair(s0, g, STORED, DTYPE), scale_pair(s1, g, STORED, DTYPE)
        a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
            decode_ptx(BITS, DTYPE == tl.bfloat16, PART, SYMMETRIC, SCALED),
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r",
            [w0, w1, w2, c0, c1, f0, f1],
            dtype=(tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
    even = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    odd = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    v = tl.join(even, odd)
    return v if INTERPRETED else v.to(DTYPE, bitcast=True)


@triton.jit
def weights(words, lines, GROUP: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
            SCALED: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """One block of each row tile: codes minus zero points, exact, or times their scales.

    Args:
        words: three int32 tensors (TILES, 128 columns / (16 * parts * W), 4, 8, 4, W): the first,
            second and third words of elements, as `load_words` returns them.
        lines: zero points of rows r and r + 8 of the tiles of 16, then their scales; packed
            integers (TILES, 1, 4, 8, 1, 1). Zeros are not read if SYMMETRIC, scales not without
            SCALED.
        GROUP: 32, 64 or 128; 0: per row.
        STORED: dtype of the scales.

    Returns:
        (TILES * 64, 128) in DTYPE (float32 when interpreted).
    """
    PARTS: tl.constexpr = parts(BITS)
    TILES: tl.constexpr = words[0].shape[0]
    SUB: tl.constexpr = words[0].shape[1]
    W: tl.constexpr = words[0].shape[5]
    sub = tl.arange(0, SUB)[None, :, None, None, None, None]
    w = tl.arange(0, W)[None, None, None, None, None, :]
    column = (sub * W + w) * (16 * PARTS)
    SPAN: tl.constexpr = GROUP if GROUP > 0 else 128
    v = _fragment(words, lines, column // SPAN, 0, BITS, SYMMETRIC, SCALED, STORED, DTYPE)
    if PARTS == 2:
        g = (column + 16) // SPAN
        v = tl.join(v, _fragment(words, lines, g, 1, BITS, SYMMETRIC, SCALED, STORED, DTYPE))
    elif PARTS == 4:
        g1, g2, g3 = (column + 16) // SPAN, (column + 32) // SPAN, (column + 48) // SPAN
        v1 = _fragment(words, lines, g1, 1, BITS, SYMMETRIC, SCALED, STORED, DTYPE)
        v2 = _fragment(words, lines, g2, 2, BITS, SYMMETRIC, SCALED, STORED, DTYPE)
        v3 = _fragment(words, lines, g3, 3, BITS, SYMMETRIC, SCALED, STORED, DTYPE)
        v = tl.join(tl.join(v, v2), tl.join(v1, v3))
    v = v.reshape((TILES, SUB, 4, 8, 4, W, 2, 2, 2, PARTS))  # m16, r, c, w, h2, half, e, part
    v = v.permute((0, 2, 7, 3, 1, 5, 9, 6, 4, 8))
    return v.reshape((TILES * 64, 128))


@triton.jit
def load_words(block_ptr, BITS: tl.constexpr, TILES: tl.constexpr, tile_stride):
    """One block of TILES row tiles, as `weights` takes it."""
    tile = tl.arange(0, TILES)[:, None] * tile_stride
    if BITS == 8:
        i = tl.arange(0, 1024)[None, :]
        at = block_ptr + tile + (i // 512) * 1024 + i % 512
        first = tl.load(at, eviction_policy="evict_first").reshape((TILES, 2, 4, 8, 4, 4))
        second = tl.load(at + 512, eviction_policy="evict_first").reshape((TILES, 2, 4, 8, 4, 4))
        return first, second, first
    elif BITS == 3:
        first = tl.load(
            block_ptr + tile + tl.arange(0, 512)[None, :], eviction_policy="evict_first"
        )
        third = tl.load(
            block_ptr + tile + 512 + tl.arange(0, 256)[None, :], eviction_policy="evict_first"
        )
        first, second = tl.split(first.reshape((TILES, 1, 4, 8, 4, 2, 2)))
        return first, second, third.reshape((TILES, 1, 4, 8, 4, 2))
    else:
        SUB: tl.constexpr = BITS // 2
        i = tl.arange(0, 512 * SUB)[None, :]
        first = tl.load(block_ptr + tile + i, eviction_policy="evict_first")
        first = first.reshape((TILES, SUB, 4, 8, 4, 4))
        return first, first, first
