# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""Packed words -> the left operand of a matrix instruction, in registers. Triton.

An OR puts codes under the mantissa of a power of two (bf16: 0x4300 | q = 128 + q, fp16:
0x6400 | q = 1024 + q), so one LOP3 makes two weights and no integer is ever converted. Taking the
zero point away, in the same form, leaves the exact integer q - z. Eight bits do not fit under
bf16's seven: there q - 128 is the difference of two such parts, 128 + (q & 127) and 128 or 256.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def unpack_ptx(bits, bf16, part):
    """PTX that makes eight 16-bit numbers ($0..$7) of one fragment from its words ($8, $9).

    Output 2 * (half + 2 * h2) + e is code (half, h2, e) of the fragment. `part` is the fragment
    within the word (2 and 3 bits), or 1 for the inverted top bit (8 bits in bf16).
    """
    magic = 0x43004300 if bf16 else 0x64006400
    ptx = [".reg .b32 t, a;"]
    for pair in range(4):
        if bits == 8:
            word, shift = f"${8 + pair // 2}", 8 * (pair % 2)
            mask = (0x00800080 if part else 0x007F007F) if bf16 else 0x00FF00FF
        else:
            width = 2 if bits == 3 else bits
            word, shift = "$8", width * (4 * part + pair)
            mask = 0x000F000F if bits == 4 else 0x00030003
        ptx.append(f"shr.u32 t, {word}, {shift};")
        table = 0xAE if bits == 8 and bf16 and part else 0xEA  # (~t & mask) | magic, or t
        ptx.append(f"lop3.b32 a, t, {mask}, {magic}, {table};")
        if bits == 3:
            up = 2 - (4 * part + pair)  # the third bit goes to bit 2
            ptx.append(f"shl.b32 t, $9, {up};" if up >= 0 else f"shr.u32 t, $9, {-up};")
            ptx.append(f"lop3.b32 a, t, {0x00040004}, a, 0xea;")
        ptx.append(f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, a;")
    return "{\n" + "\n".join(ptx) + "\n}"


@triton.jit
def _number(
    words,
    high,
    PAIR: tl.constexpr,
    E: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PART: tl.constexpr,
):
    """One output of `unpack_ptx` without assembly: the interpreter's path."""
    BF16: tl.constexpr = DTYPE == tl.bfloat16
    MAGIC: tl.constexpr = 0x4300 if BF16 else 0x6400
    if BITS == 8:
        if PAIR < 2:
            field = words >> (8 * PAIR + 16 * E)
        else:
            field = high >> (8 * (PAIR - 2) + 16 * E)
        if BF16:
            field = (~field & 0x80) if PART == 1 else (field & 0x7F)
        else:
            field = field & 0xFF
    elif BITS == 4:
        field = (words >> (4 * PAIR + 16 * E)) & 15
    else:
        field = (words >> (8 * PART + 2 * PAIR + 16 * E)) & 3
        if BITS == 3:
            field = field | (((high >> (4 * PART + PAIR + 16 * E)) & 1) << 2)
    return (field | MAGIC).to(tl.int16)


@triton.jit
def _fragment(
    words, high, BITS: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr, TWO: tl.constexpr
):
    """int32 (..., W) -> (..., W, h2, half, e): code + magic; `TWO`: codes span words and high."""
    if INTERPRETED:
        a0 = _number(words, high, 0, 0, BITS, DTYPE, PART)
        b0 = _number(words, high, 0, 1, BITS, DTYPE, PART)
        a1 = _number(words, high, 1, 0, BITS, DTYPE, PART)
        b1 = _number(words, high, 1, 1, BITS, DTYPE, PART)
        a2 = _number(words, high, 2, 0, BITS, DTYPE, PART)
        b2 = _number(words, high, 2, 1, BITS, DTYPE, PART)
        a3 = _number(words, high, 3, 0, BITS, DTYPE, PART)
        b3 = _number(words, high, 3, 1, BITS, DTYPE, PART)
    elif TWO:
        a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
            unpack_ptx(BITS, DTYPE == tl.bfloat16, PART),
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [words, high],
            dtype=(tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        a0, b0, a1, b1, a2, b2, a3, b3 = tl.inline_asm_elementwise(
            unpack_ptx(BITS, DTYPE == tl.bfloat16, PART),
            "=h,=h,=h,=h,=h,=h,=h,=h,r",
            [words],
            dtype=(tl.int16,) * 8,
            is_pure=True,
            pack=1,
        )
    even = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    odd = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    v = tl.join(even, odd).to(DTYPE, bitcast=True)
    if INTERPRETED:  # which silently computes nonsense in bf16
        v = v.to(tl.float32)
    return v


@triton.jit
def _operand(
    words,
    high,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PART: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    W: tl.constexpr,
):
    """Words (TILES, BLOCKS * 128 * W) -> code + magic, (TILES * 64 rows, columns)."""
    TWO: tl.constexpr = BITS == 3 or BITS == 8
    ROWS: tl.constexpr = TILES * 64
    if BITS == 2 or BITS == 3:
        v = tl.join(
            _fragment(words, high, BITS, DTYPE, 0, TWO), _fragment(words, high, BITS, DTYPE, 1, TWO)
        )  # tile, (block, m16, r, c, word), h2, half, e, chunk
        v = v.reshape((TILES, BLOCKS, 4, 8, 4, W, 2, 2, 2, 2))
        v = v.permute((0, 2, 7, 3, 1, 5, 9, 6, 4, 8))
        return v.reshape((ROWS, BLOCKS * W * 32))
    else:
        v = _fragment(words, high, BITS, DTYPE, PART, TWO)
        v = v.reshape((TILES, BLOCKS, 4, 8, 4, W, 2, 2, 2))
        v = v.permute((0, 2, 7, 3, 1, 5, 6, 4, 8))
        return v.reshape((ROWS, BLOCKS * W * 16))


@triton.jit
def _magic(zero, MASK: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 zero points -> magic + (zero & MASK)."""
    MAGIC: tl.constexpr = 0x4300 if DTYPE == tl.bfloat16 else 0x6400
    z = ((zero.to(tl.int16) & MASK) | MAGIC).to(DTYPE, bitcast=True)
    if INTERPRETED:
        z = z.to(tl.float32)
    return z


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 -> DTYPE, to nearest even. The interpreter truncates to bf16: there, by the bits."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def centred(
    words,
    high,
    zero,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    DTYPE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    W: tl.constexpr,
):
    """Codes minus zero points, exact integers in DTYPE (float32 when interpreted).

    Args:
        words, high: int32 (TILES, BLOCKS * 128 * W): the planes (`high`: 3 and 8 bits).
        zero: uint8 (TILES * 64,); not read if SYMMETRIC.

    Returns:
        (TILES * 64, columns).
    """
    BF16: tl.constexpr = DTYPE == tl.bfloat16
    v = _operand(words, high, BITS, DTYPE, 0, TILES, BLOCKS, W)
    if BITS == 8 and BF16:
        top = _operand(words, high, BITS, DTYPE, 1, TILES, BLOCKS, W)
        centre = v - top  # q - 128
        if SYMMETRIC:
            return centre
        else:
            return centre - (_magic(zero, 127, DTYPE) - _magic(zero ^ 128, 128, DTYPE))[:, None]
    elif SYMMETRIC:
        MIDDLE: tl.constexpr = (128.0 if BF16 else 1024.0) + (1 << (BITS - 1))
        return v - MIDDLE
    else:
        return v - _magic(zero, 255, DTYPE)[:, None]


@triton.jit
def load_words(
    block_ptr, BITS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, tile_stride
):
    """Load BLOCKS consecutive blocks of TILES row tiles: (words, high), (TILES, BLOCKS * 512)."""
    WORDS: tl.constexpr = 768 if BITS == 3 else (1024 if BITS == 8 else 512)
    tile = tl.arange(0, TILES)[:, None] * tile_stride
    i = tl.arange(0, BLOCKS * 512)[None, :]
    at = block_ptr + tile + (i // 512) * WORDS + i % 512
    words = tl.load(at, eviction_policy="evict_first")
    if BITS == 8:
        high = tl.load(at + 512, eviction_policy="evict_first")
    elif BITS == 3:
        j = tl.arange(0, BLOCKS * 256)[None, :]
        at = block_ptr + tile + (j // 256) * WORDS + 512 + j % 256
        high = tl.load(at, eviction_policy="evict_first")
        high = tl.join(high, high >> 8).reshape((TILES, BLOCKS * 512))  # eight bits per word
    else:
        high = words
    return words, high


@triton.jit
def halves(words, TILES: tl.constexpr, W: tl.constexpr):
    """Split one block's words (TILES, 128 * W) into its left and right columns."""
    w = words.reshape((TILES, 128, 2, W // 2)).permute((0, 1, 3, 2))
    left, right = tl.split(w)
    return left.reshape((TILES, 64 * W)), right.reshape((TILES, 64 * W))
