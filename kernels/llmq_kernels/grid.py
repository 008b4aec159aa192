# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# A constexpr of Triton is typed as a class of its own, and a tensor as nearly everything.
"""Scales and zero points, from packed lines to the registers that unpacking wants them in. Triton.

A line is what one row has of them in one block of 128 columns: 1, 2 or 4 groups, side by side in
memory, so that one load fetches them as an integer.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def lift(bits, bf16, half):
    """How many bits above the end of the mantissa the codes of rows 8 to 15 are taken."""
    return {2: 2, 3: 3, 4: 0 if bf16 else 4, 8: 0}[bits] if half else 0


@triton.constexpr_function
def minus(number, bits, bf16, half):
    """-(magic + number), divided by 2**lift, as a 16-bit float: what centres a lifted code."""
    up = lift(bits, bf16, half)
    return 0x8000 | ((0x4300 - (up << 7) if bf16 else 0x6400 - (up << 10)) + (number << up))


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
    """Pointers to the scales and the zero points of one block: to one integer per row.

    Zero points, and the scales of groups of 32, are for `unpack.weights`: (TILES, 1, 4, 8, 1, 1),
    rows 0 to 7 of each tile of 16. Other scales are for the accumulator: (64,), of the first tile.
    """
    P: tl.constexpr = 128 // GROUP if GROUP > 0 else 1
    start = (tile * lines + line) * 64
    row = tl.arange(0, 4)[None, None, :, None, None, None] * 16
    row += tl.arange(0, 8)[None, None, None, :, None, None]
    row += tl.arange(0, TILES)[:, None, None, None, None, None] * (lines * 64)
    z_ptrs = packed(z_ptr, P) + start + row
    s_ptrs = packed(s_ptr, P) + start
    s_ptrs += row if GROUP == 32 else tl.arange(0, 64)
    return s_ptrs, z_ptrs


@triton.jit
def load_grid(s_ptrs, z_ptrs, at, left, tile_stride, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
          TILES: tl.constexpr):  # fmt: skip
    """The grid of a block, `at` numbers on: (zeros, zeros, scales, scales), each of rows r, r + 8.

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
        return s0, s0, s0, s1
    else:
        return _load(z_ptrs + at, left), _load(z_ptrs + at + 8, left), s0, s1


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


@triton.jit
def centre(line, g, BITS: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """Zero point g of a line -> what `decode_ptx` adds to centre the codes of this half, twice."""
    BF16: tl.constexpr = DTYPE == tl.bfloat16
    LIFT: tl.constexpr = lift(BITS, BF16, HALF)
    BASE: tl.constexpr = minus(0, BITS, BF16, HALF)
    if BITS == 8 and BF16:  # 128 - zero: from 2**23 + zero, which needs no conversion
        number = _permuted(line, 0x4B, 0x4550 + g).to(tl.float32, bitcast=True)
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [8388608.0 + 128.0 - number],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif LIFT == 0:
        return _permuted(line, (BASE >> 8) * 0x01010101 - 2**32, 0x4040 + g * 0x0101)
    else:
        return _permuted(line, 0, 0x4040 + g * 0x0101) * 2**LIFT + (BASE * 0x10001 - 2**32)


@triton.jit
def scale_pair(line, g, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """Scale g of a line of 16-bit scales, in DTYPE, twice."""
    if STORED == DTYPE:
        word = (line >> (g // 2 * 32)).to(tl.int32)
        return _permuted(word, word, 0x1010 + g % 2 * 0x2222)
    else:
        bits = scale_of(line, g, STORED).to(DTYPE).to(tl.int16, bitcast=True)
        return (bits.to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def scale_of(line, g, STORED: tl.constexpr):
    """Scale g of a line, in float32."""
    WIDTH: tl.constexpr = STORED.primitive_bitwidth
    bits = line >> (g * WIDTH)
    bits = bits.to(tl.int16) if WIDTH == 16 else bits.to(tl.int32)
    return bits.to(STORED, bitcast=True).to(tl.float32)
