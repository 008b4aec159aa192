"""The inline assembly, run instruction by instruction on tensors, and the arithmetic after it.

Every position of a block meets every code: what the assembly makes of packed words must be the
codes that `reference` reads from them, and code minus zero point must be exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmq_kernels import bitfields, layout, reference

pytest.importorskip("triton", minversion="3.6")
WORD = 0xFFFFFFFF
DTYPES = (torch.bfloat16, torch.float16)


def lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """PTX: bit (a << 2 | b << 1 | c) of the table, for each bit of the operands."""
    out = torch.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & WORD


def fma(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """PTX fma.rn on both halves of a register: float64 holds every a * b + c here exactly."""
    done = torch.zeros_like(a)
    for shift in (0, 16):
        x, y, z = (as_numbers(t >> shift & 0xFFFF, dtype).double() for t in (a, b, c))
        done |= (x * y + z).to(dtype).view(torch.uint16).long() << shift
    return done


def prmt(a: Tensor, b: Tensor, select: Tensor) -> Tensor:
    """PTX: four of eight bytes; digits of 8 and more repeat signs, which nobody asks for."""
    bytes_ = torch.stack([t >> 8 * i & 0xFF for t in (a, b) for i in range(4)])
    out = torch.zeros_like(a)
    for i in range(4):
        digit = (select >> 4 * i & 15).expand_as(a)
        assert (digit < 8).all()
        out |= bytes_.gather(0, digit[None])[0] << 8 * i
    return out


def run_ptx(text: str, inputs: dict[str, Tensor], outputs: int = 8) -> list[Tensor]:
    """Straight-line PTX on tensors of registers (int64): $0, $1, ... are its outputs."""
    registers = dict(inputs)
    declared: set[str] = set()
    like = next(iter(inputs.values()))

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.full_like(like, int(name, 0))

    for line in text.strip("{}\n").split("\n"):
        name, _, rest = line.strip().rstrip(";").partition(" ")
        operands = [o.strip(" {}") for o in rest.split(",")]
        if name == ".reg":
            declared = {o.removeprefix(".b32 ") for o in operands}
            continue
        first, *others = operands
        assert first in declared or first.startswith("$"), line
        if name == "shr.u32":
            a, shift = map(value, others)
            registers[first] = a >> shift
        elif name == "lop3.b32":
            a, b, c = map(value, others[:3])
            registers[first] = lop3(a, b, c, int(others[3], 0))
        elif name == "prmt.b32":
            registers[first] = prmt(*map(value, others))
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            assert all(o in registers for o in others), line  # PTX takes no numbers here
            dtype = torch.bfloat16 if "bf16" in name else torch.float16
            a, b, c = map(value, others)
            registers[first] = fma(a, b, c, dtype)
        else:
            assert name == "mov.b32", line
            if len(others) == 1:
                registers[first] = value(others[0])
            elif rest.endswith("}"):  # word, {low, high}
                low, high = map(value, others)
                assert ((low | high) >> 16 == 0).all(), line
                registers[first] = low | high << 16
            else:  # {low, high}, word
                word = value(others[1])
                registers[first], registers[others[0]] = word & 0xFFFF, word >> 16
    made = [f"${i}" for i in range(outputs)]
    assert {r for r in registers if r.startswith("$")} - inputs.keys() == set(made)
    return [registers[r] for r in made]


def as_numbers(bits16: Tensor, dtype: torch.dtype) -> Tensor:
    """Bit patterns (0..65535) as floating-point numbers."""
    return bits16.to(torch.uint16).view(dtype)


def as_pair(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as registers that hold each twice."""
    return numbers.to(dtype).view(torch.uint16).long() * 0x10001


def every_code_everywhere(bits: int) -> Tensor:
    """Codes (64 * 2**bits, 128): the row tiles together hold each code at each position."""
    torch.manual_seed(bits)
    start = torch.randint(0, 2**bits, (1, 64, 128))
    step = torch.arange(2**bits).view(-1, 1, 1)
    return ((start + step) % 2**bits).flatten(0, 1).to(torch.uint8)


def centring(zero: int, bits: int, dtype: torch.dtype, half: int) -> Tensor:
    """What `grid.centre` makes of a zero point: the bits of a 16-bit float, as a tensor of one."""
    from llmq_kernels.grid import centre_ptx, lift, minus, shrunk

    bf16 = dtype == torch.bfloat16
    up = lift(bits, bf16, half)
    if not bf16 and not up:
        made = torch.tensor([0xE400 | zero])
    else:
        word = torch.tensor([(0x00 if bf16 else 0x6400) + zero]) * 0x10001
        (pair,) = run_ptx(centre_ptx(bits, bf16, half), {"$1": word}, outputs=1)
        made = pair & 0xFFFF
        assert torch.equal(pair >> 16, made)
    expected = -zero / shrunk(bf16) if bf16 else -(1024 / 2**up) - zero
    assert as_numbers(made, dtype).item() == expected
    if zero == 2 ** (bits - 1):
        assert made.item() == minus(zero, bits, bf16, half)
    return made


def assembled(
    codes: Tensor, zero: int | None, scale: float | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """The weights (N, 128) that the assembly makes of packed codes, in the place of their code.

    In float64 and times `shrunk`, which the kernels do after the product.
    """
    from llmq_kernels.grid import shrunk
    from llmq_kernels.unpack import decode_ptx

    qweight = layout.pack_codes(codes, bits)
    words = [w.squeeze(1).unflatten(1, (4, 8, 4)).long() & WORD for w in
             layout.element_words(qweight, bits)]  # tile, m16, r, c, element  # fmt: skip
    inputs = {f"${8 + i}": word for i, word in enumerate(words)}
    for half in (0, 1):
        if zero is not None:
            inputs[f"${11 + half}"] = centring(zero, bits, dtype, half).expand_as(words[0])
        if scale is not None:
            number = torch.full_like(words[0], scale, dtype=torch.float64)
            inputs[f"${13 + half}"] = number.to(dtype).view(torch.uint16).long()
    made = []
    for part in range(bitfields.parts(bits)):
        text = decode_ptx(bits, dtype == torch.bfloat16, part, zero is None, scale is not None)
        made.append(torch.stack(run_ptx(text, inputs), -1))
    t = torch.stack(made, -2).unflatten(-1, (2, 2, 2))  # ..., element, part, h2, half, e
    t = t.permute(0, 1, 7, 2, 4, 5, 6, 3, 8)  # tile, m16, half, r, element, part, h2, c, e
    return as_numbers(t.reshape(-1, 128), dtype).double() * shrunk(dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_assembly_unpacks_every_code_at_every_position(bits: int, dtype: torch.dtype) -> None:
    codes = every_code_everywhere(bits)
    weight = layout.pack(codes, torch.ones(len(codes), 1), None, bits=bits, group_size=-1)
    expected = reference.dequantize(weight, torch.float64)
    assert torch.equal(expected, codes.double() - 2 ** (bits - 1))
    assert torch.equal(assembled(codes, None, None, bits, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_code_minus_zero_point_is_exact(bits: int, dtype: torch.dtype) -> None:
    codes = every_code_everywhere(bits)[: 64 * 16]
    if bits == 8:
        codes = torch.arange(256).repeat(64, 1).view(128, 128).to(torch.uint8)
    zeros = range(2**bits) if bits < 8 else (0, 1, 2, 63, 64, 127, 128, 129, 200, 254, 255)
    for zero in zeros:
        made = assembled(codes, zero, None, bits, dtype)
        assert torch.equal(made, codes.double() - zero), zero


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_scaled_weights_are_rounded_once(bits: int, dtype: torch.dtype) -> None:
    codes = every_code_everywhere(bits)[: 64 * 8]
    for zero, scale in ((None, 0.0123), (2**bits - 1, -3.4), (1, 1e-4)):
        made = assembled(codes, zero, scale, bits, dtype)
        middle = 2 ** (bits - 1) if zero is None else zero
        exact = (codes.double() - middle) * torch.tensor(scale, dtype=dtype).double()
        assert torch.equal(made, exact.to(dtype).double())


def test_every_bit_of_a_word_is_used_once() -> None:
    for bits in layout.BITS:
        used = [
            (piece.word, piece.bit + i)
            for part in range(bitfields.parts(bits))
            for h2, half in itertools.product((0, 1), (0, 1))
            for piece in bitfields.pieces(bits, part, h2, half)
            for i in range(piece.width)
        ]
        words = bitfields.words_per_element(bits)
        assert sorted(used) == list(itertools.product(range(words), range(16)))


def test_the_emulator_is_not_blind() -> None:
    a, b, c = (torch.tensor([x]) for x in (0b1100, 0b1010, 0b0110))
    assert lop3(a, b, c, 0xEA).item() == (0b1100 & 0b1010) | 0b0110
    assert lop3(a, b, c, 0x96).item() == 0b1100 ^ 0b1010 ^ 0b0110
    word = torch.tensor([0x89ABCDEF])
    text = "{\n" + "\n".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, $8;" for i in range(4)) + "\n}"
    assert [int(x) for x in run_ptx(text, {"$8": word})] == [0xCDEF, 0x89AB] * 4
    with pytest.raises(AssertionError):
        run_ptx("{\nvadd4.u32.u32.u32 t, $8, $8, 0;\n}", {"$8": word})
    a, b = torch.tensor([0x33221100]), torch.tensor([0x77665544])
    assert prmt(a, b, torch.tensor(0x4271)).item() == 0x44227711
    one, two = (
        as_pair(torch.tensor([1.0]), torch.float16),
        as_pair(torch.tensor([2.5]), torch.float16),
    )
    assert fma(two, two, one, torch.float16).item() == 0x47404740  # 7.25
