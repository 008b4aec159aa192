# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""Scales and zero points, from packed lines to the registers that unpacking wants them in. Triton.

A line is what one row has of them in one block of 128 columns: P = 1, 2 or 4 groups, side by side
in memory, so that one load fetches them as an integer; of zero points, what rows r and r + 8 have.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def shrunk(bf16):
    """Unpacked weights are this many times smaller than codes minus zero points."""
    return 64.0 if bf16 else 1.0


@triton.constexpr_function
def lift(bits, bf16, half):
    """fp16: how many bits above the end of the mantissa the codes of rows 8 to 15 are taken."""
    return {2: 2, 3: 3, 4: 4, 8: 0}[bits] if half and not bf16 else 0


@triton.constexpr_function
def minus(number, bits, bf16, half):
    """What centres codes whose zero point is `number`, as a 16-bit float.

    bf16: -number / 64, for powers of two. fp16: -(1024 + number), divided by 2**lift.
    """
    if bf16:
        return 0x8000 | ((127 + number.bit_length() - 7) << 7)
    up = lift(bits, bf16, half)
    return 0x8000 | (0x6400 - (up << 10) + (number << up))


@triton.jit
def packed(ptr, P: tl.constexpr):
    """A pointer to numbers -> to integers that hold P of them."""
    BYTES: tl.constexpr = P * ptr.dtype.element_ty.primitive_bitwidth // 8
    if BYTES == 1:
        return ptr
    elif BYTES == 2:
        return ptr.to(tl.pointer_type(tl.uint16))
    elif BYTES == 4:
        return ptr.to(tl.pointer_type(tl.int32))
    else:
        return ptr.to(tl.pointer_type(tl.int64))


@triton.jit
def grid_pointers(s_ptr, z_ptr, tile, line, lines, GROUP: tl.constexpr, TILES: tl.constexpr):
    """Pointers to the scales and the zero points of one block.

    Zero points: one integer per pair of rows r, r + 8, and scales of groups of 32: one per row r;
    for `unpack.weights`: (TILES, 1, 4, 8, 1, 1), rows 0 to 7 of each tile of 16. Other scales are
    for the accumulator: (64,), of the first tile.
    """
    P: tl.constexpr = 128 // GROUP if GROUP > 0 else 1
    start = (tile * lines + line) * 64
    m16 = tl.arange(0, 4)[None, None, :, None, None, None]
    r = tl.arange(0, 8)[None, None, None, :, None, None]
    wide = tl.arange(0, TILES)[:, None, None, None, None, None] * (lines * 64)
    z_ptrs = packed(z_ptr, 2 * P) + start // 2 + (m16 * 8 + r + wide // 2)
    s_ptrs = packed(s_ptr, P) + start
    s_ptrs += m16 * 16 + r + wide if GROUP == 32 else tl.arange(0, 64)
    return s_ptrs, z_ptrs


@triton.jit
def load_grid(s_ptrs, z_ptrs, at, left, tile_stride, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
          TILES: tl.constexpr):  # fmt: skip
    """The grid of a block, `at` rows on: (zeros of rows r and r + 8, scales of r, of r + 8).

    Scales of the accumulator come as one, twice. What is not needed is any of the others. Nothing
    is loaded unless `left` is None or positive.

    Loads of fewer elements than threads are cheap enough for the compiler to issue them in the
    layout that their reader wants; a wider one would travel through shared memory.
    """
    s0 = _load(s_ptrs + at, left)
    if GROUP == 32:
        s1 = _load(s_ptrs + at + 8, left)
    else:
        if TILES == 2:
            s1 = _load(s_ptrs + at + tile_stride, left)
            s0 = tl.join(s0, s1).permute((1, 0)).reshape((128,))
        s1 = s0
    if SYMMETRIC:
        return s0, s0, s1
    else:
        return _load(z_ptrs + at // 2, left), s0, s1


@triton.jit
def _load(ptrs, left):
    """Integers of 32 bits at least: narrower ones would be packed when the loop carries them."""
    if left is None:
        line = tl.load(ptrs)
    else:
        line = tl.load(ptrs, mask=tl.full(ptrs.shape, 0, tl.int32) < left)
    return line if line.dtype.primitive_bitwidth >= 32 else line.to(tl.int32)


@triton.jit
def _permuted(a, b, select):
    """Four of the eight bytes of a (0 to 3) and b (4 to 7), as the digits of `select` say."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, select], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.constexpr_function
def centre_ptx(bits, bf16, half):
    """PTX that makes of two zero points what centres codes of this half.

    bf16: a byte at the end of a float is zero * 2**-133, and -2**127 times that is -zero / 64.
    fp16: 1024 + zero comes in; see `minus` for what goes out.
    """
    if bf16:
        kind, factor, plus = "bf16x2", 0xFF00FF00, 0x80008000
    else:
        up = lift(bits, bf16, half)
        kind, factor, plus = "f16x2", 0xBC00BC00, (0x6400 - (1024 >> (up - 1))) * 0x10001
    lines = [".reg .b32 f, m;", f"mov.b32 f, {factor};", f"mov.b32 m, {plus};"]
    return "\n".join(["{", *lines, f"fma.rn.{kind} $0, $1, f, m;", "}"])


@triton.jit
def _words(line):
    """The two words of a 64-bit integer, without arithmetic."""
    return tl.inline_asm_elementwise(
        "mov.b64 {$0, $1}, $2;", "=r,=r,l", [line], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def centre(line, g, P: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """Zero point g of row r (HALF 0) or r + 8 -> what `decode_ptx` adds to codes there: 16 bits.

    Two neighbours of a line are made at once.
    """
    BF16: tl.constexpr = DTYPE == tl.bfloat16
    LIFT: tl.constexpr = lift(BITS, BF16, HALF)
    ABOVE: tl.constexpr = 0 if BF16 else (0x64646464 if LIFT else 0xE4E4E4E4 - 2**32)
    byte = g
    if P == 4:
        low, high = _words(line)
        line = high if HALF else low
    else:
        byte = g + P * HALF
    pair = _permuted(line, ABOVE, 0x4140 + byte // 2 * 0x0202)
    if BF16 or LIFT:
        pair = tl.inline_asm_elementwise(
            centre_ptx(BITS, BF16, HALF), "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1
        )
    return (pair >> (byte % 2 * 16)).to(tl.int16)


@triton.jit
def zero_of(line, g, P: tl.constexpr, HALF: tl.constexpr):
    """Zero point g of row r (HALF 0) or r + 8, as an integer."""
    return ((line >> ((g + P * HALF) * 8)) & 255).to(tl.int32)


@triton.jit
def scale_bits(line, g, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """Scale g of a line of four, in DTYPE: 16 bits."""
    if STORED == DTYPE:
        low, high = _words(line)
        return (tl.where(g < 2, low, high) >> (g % 2 * 16)).to(tl.int16)
    else:
        return scale_of(line, g, STORED).to(DTYPE).to(tl.int16, bitcast=True)


@triton.jit
def scale_of(line, g, STORED: tl.constexpr):
    """Scale g of a line, in float32."""
    WIDTH: tl.constexpr = STORED.primitive_bitwidth
    bits = line >> (g * WIDTH)
    bits = bits.to(tl.int16) if WIDTH == 16 else bits.to(tl.int32)
    return bits.to(STORED, bitcast=True).to(tl.float32)
