# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""Packed words -> the left operand of a matrix instruction, in registers. Triton.

No integer is ever converted. fp16: an OR puts a code under the mantissa of 1024 (0x6400 | q =
1024 + q), and a multiply-add takes that and the zero point away; it may divide as well, so that
codes of rows 8 to 15 stay `lift` bits above the end of the mantissa and need no shift. bf16: a
code in the lowest eight bits of a float is code * 2**-133 (a subnormal number; from 128 on a
normal one, with the same spacing), and times 2**127, minus zero / 64, is (code - zero) / 64.
Where in the eight bits it lies is a matter of that factor. Both are exact.
"""

import triton
import triton.language as tl

from . import bitfields
from .grid import centre, lift, minus, scale_bits, scale_of, shrunk, zero_of

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
pieces = triton.constexpr_function(bitfields.pieces)
shift = triton.constexpr_function(bitfields.shift)
parts = triton.constexpr_function(bitfields.parts)


@triton.constexpr_function
def decode_ptx(bits, bf16, part, symmetric, scaled):
    """PTX: the eight 16-bit weights ($0..$7) of one fragment of an element.

    Output 2 * (half + 2 * h2) + e is code (half, h2, e), minus its zero point, times its scale if
    `scaled`. Inputs: the element's words $8, $9, $10; for half 0 and 1 the pairs that centre
    ($11, $12, see `centre`) and the scales ($13, $14), as pairs of equal 16-bit floats.
    """
    kind, magic = ("bf16x2", 0) if bf16 else ("f16x2", 0x64006400)
    ptx = [".reg .b32 t, a, m, f;"]
    for h2, half in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if symmetric:
            ptx.append(f"mov.b32 m, {minus(1 << (bits - 1), bits, bf16, half) * 0x10001};")
        else:
            ptx.append(f"mov.b32 m, {{${11 + half}, ${11 + half}}};")
        place, found = _found(bits, bf16, part, h2, half, magic)
        factor = ((254 - place) << 7 if bf16 else (15 - place) << 10) * 0x10001
        ptx += [*found, f"mov.b32 f, {factor};", f"fma.rn.{kind} a, a, f, m;"]
        if scaled:
            ptx.append(f"mov.b32 f, {{${13 + half}, ${13 + half}}};")
            ptx.append(f"mov.b32 m, {0x80008000};")
            ptx.append(f"fma.rn.{kind} a, a, f, m;")
        pair = half + 2 * h2
        ptx.append(f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, a;")
    return "{\n" + "\n".join(ptx) + "\n}"


@triton.constexpr_function
def _found(bits, bf16, part, h2, half, magic):
    """PTX that leaves a pair of codes, times 2**place, in `a`, over `magic`; and that place."""
    if bits == 8:
        return 0, [f"prmt.b32 a, ${8 + h2}, {magic | magic >> 8}, {0x4341 if half else 0x4240};"]
    found = pieces(bits, part, h2, half)
    word, bit, _ = found[0]
    place = bit - shift(bits, word, bit) if bf16 else lift(bits, bf16, half)
    at, over, ptx = place, magic, []
    for word, bit, width in found:
        source = f"${8 + word}"
        if bit != at:
            ptx.append(f"shr.u32 t, {source}, {bit - at};")
            source = "t"
        mask = (((1 << width) - 1) << at) * 0x10001
        ptx.append(f"lop3.b32 a, {source}, {mask}, {over}, 0xEA;")  # (source & mask) | over
        at, over = at + width, "a"
    return place, ptx


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
    value = (code - zero).to(tl.float32) / shrunk(DTYPE == tl.bfloat16)
    return value if scale is None else rounded(value * scale, DTYPE).to(tl.float32)


@triton.jit
def _interpreted(words, lines, g, PART: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr,
                 SYMMETRIC: tl.constexpr, SCALED: tl.constexpr, STORED: tl.constexpr,
                 DTYPE: tl.constexpr):  # fmt: skip
    """`decode_ptx` for the interpreter: its eight outputs, in float32."""
    z, s0, s1 = lines
    found = []
    for h2, half in ((0, 0), (0, 1), (1, 0), (1, 1)):
        s, scale = (s1, None) if half else (s0, None)
        zero = 2 ** (BITS - 1) if SYMMETRIC else zero_of(z, g, P, half)
        if SCALED:
            scale = rounded(scale_of(s, g, STORED), DTYPE).to(tl.float32)
        for e in (0, 1):
            found.append(_number(words, zero, scale, PART, h2, half, e, BITS, DTYPE))
    return found


@triton.jit
def _fragment(words, lines, g, PART: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr,
              SYMMETRIC: tl.constexpr, SCALED: tl.constexpr, STORED: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """Fragment PART of every element: (..., h2, half, e)."""
    if INTERPRETED:
        a0, b0, a1, b1, a2, b2, a3, b3 = _interpreted(
            words, lines, g, PART, P, BITS, SYMMETRIC, SCALED, STORED, DTYPE
        )
    else:
        w0, w1, w2 = words
        z, s0, s1 = lines
        unused = w0.to(tl.int16)
        c0, c1, f0, f1 = unused, unused, unused, unused
        if not SYMMETRIC:
            c0, c1 = centre(z, g, P, BITS, DTYPE, 0), centre(z, g, P, BITS, DTYPE, 1)
        if SCALED:
            f0, f1 = scale_bits(s0, g, STORED, DTYPE), scale_bits(s1, g, STORED, DTYPE)
        a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
            decode_ptx(BITS, DTYPE == tl.bfloat16, PART, SYMMETRIC, SCALED),
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,h,h,h,h",
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
        lines: zero points of rows r and r + 8 of the tiles of 16, then scales of rows r, and of
            rows r + 8; packed integers (TILES, 1, 4, 8, 1, 1). Zeros are not read if SYMMETRIC,
            scales not without SCALED.
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
    P: tl.constexpr = 128 // SPAN
    v = _fragment(words, lines, column // SPAN, 0, P, BITS, SYMMETRIC, SCALED, STORED, DTYPE)
    if PARTS == 2:
        g = (column + 16) // SPAN
        v = tl.join(v, _fragment(words, lines, g, 1, P, BITS, SYMMETRIC, SCALED, STORED, DTYPE))
    elif PARTS == 4:
        g1, g2, g3 = (column + 16) // SPAN, (column + 32) // SPAN, (column + 48) // SPAN
        v1 = _fragment(words, lines, g1, 1, P, BITS, SYMMETRIC, SCALED, STORED, DTYPE)
        v2 = _fragment(words, lines, g2, 2, P, BITS, SYMMETRIC, SCALED, STORED, DTYPE)
        v3 = _fragment(words, lines, g3, 3, P, BITS, SYMMETRIC, SCALED, STORED, DTYPE)
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
