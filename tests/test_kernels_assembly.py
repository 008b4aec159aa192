"""The inline assembly, run instruction by instruction on tensors, and the arithmetic after it.

Every position of a block meets every code: what the assembly makes of packed words must be the
codes that `reference` reads from them, and code minus zero point must be exact.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from llmq_kernels import layout, plan, reference

pytest.importorskip("triton")
WORD = 0xFFFFFFFF
MAGIC = {torch.bfloat16: (0x4300, 128), torch.float16: (0x6400, 1024)}


def lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """PTX: bit (a << 2 | b << 1 | c) of the table, for each bit of the operands."""
    out = torch.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & WORD


def run_ptx(text: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Straight-line PTX on tensors of 32-bit registers (int64, 0..2**32 - 1): $0..$7."""
    registers = dict(inputs)
    declared = {"t": False}
    like = next(iter(inputs.values()))

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.full_like(like, int(name, 0))

    for line in text.strip("{}\n").split("\n"):
        name, _, rest = line.strip().rstrip(";").partition(" ")
        operands = [o.strip(" {}") for o in rest.split(",")]
        if name == ".reg":
            declared = dict.fromkeys(o.removeprefix(".b32 ") for o in operands)
            continue
        first, *others = operands
        assert first in declared or first.startswith("$"), line
        if name == "shr.u32":
            a, shift = map(value, others)
            registers[first] = a >> shift
        elif name == "shl.b32":
            a, shift = map(value, others)
            registers[first] = a << shift & WORD
        elif name == "lop3.b32":
            a, b, c = map(value, others[:3])
            registers[first] = lop3(a, b, c, int(others[3], 0))
        else:
            assert name == "mov.b32", line  # {low, high}, word
            word = value(others[1])
            registers[first], registers[others[0]] = word & 0xFFFF, word >> 16
    assert {name for name in registers if re.fullmatch(r"\$[0-7]", name)} == {
        f"${i}" for i in range(8)
    }
    return [registers[f"${i}"] for i in range(8)]


def every_code_everywhere(bits: int) -> Tensor:
    """Codes (64 * 2**bits, unit): the row tiles together hold each code at each position."""
    torch.manual_seed(bits)
    start = torch.randint(0, 2**bits, (1, 64, plan.unit(bits)))
    step = torch.arange(2**bits).view(-1, 1, 1)
    return ((start + step) % 2**bits).flatten(0, 1).to(torch.uint8)


def as_numbers(bits16: Tensor, dtype: torch.dtype) -> Tensor:
    """Bit patterns (0..65535) as floating-point numbers."""
    return bits16.to(torch.uint16).view(dtype)


def assembled(qweight: Tensor, bits: int, dtype: torch.dtype, part: int | None) -> Tensor:
    """The numbers (N, K) that the assembly makes of a block's words, in the place of their code."""
    from llmq_kernels.unpack import unpack_ptx

    chunks = plan.unit(bits) // 64
    words = qweight.long().squeeze(1) & WORD  # tile, word of the block
    first = words[:, :512].unflatten(1, (4, 8, 4, 4))  # m16, r, c, word
    second = words[:, 512:]
    if bits == 8:
        second = second.unflatten(1, (4, 8, 4, 4))
    elif bits == 3:  # as load_words: a word holds eight bits for each of two words
        second = second.unflatten(1, (4, 8, 4, 2))
        second = torch.stack([second, second >> 8], -1).flatten(-2)
    made = []
    for chunk in range(chunks):
        text = unpack_ptx(bits, dtype == torch.bfloat16, chunk if part is None else part)
        made.append(torch.stack(run_ptx(text, {"$8": first, "$9": second}), -1))
    t = torch.stack(made, -2).unflatten(-1, (2, 2, 2))  # ..., word, chunk, h2, half, e
    t = t.permute(0, 1, 7, 2, 4, 5, 6, 3, 8)  # tile, m16, half, r, word, chunk, h2, c, e
    return as_numbers(t.reshape(-1, plan.unit(bits)), dtype)


@pytest.mark.parametrize("dtype", MAGIC, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_assembly_unpacks_every_code_at_every_position(bits: int, dtype: torch.dtype) -> None:
    codes = every_code_everywhere(bits)
    scale = torch.ones(len(codes), 1)
    weight = layout.pack(codes, scale, scale * 0, bits=bits, group_size=-1)
    expected = reference.dequantize(weight, torch.float64)
    assert torch.equal(expected, codes.double())
    _, magic = MAGIC[dtype]
    if bits == 8 and dtype == torch.bfloat16:  # seven bits fit beside the magic, then the top one
        low = assembled(weight.qweight, bits, dtype, 0).double()
        top = assembled(weight.qweight, bits, dtype, 1).double()
        assert torch.equal(low, magic + expected % 128)
        assert torch.equal(top, 256 - expected.div(128, rounding_mode="floor") * 128)
    else:
        assert torch.equal(assembled(weight.qweight, bits, dtype, None).double(), magic + expected)


def as_kernel(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """code | magic as a number, the form that the assembly leaves."""
    return as_numbers(codes.long() | MAGIC[dtype][0], dtype)


@pytest.mark.parametrize("dtype", MAGIC, ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_code_minus_zero_point_is_exact(bits: int, dtype: torch.dtype) -> None:
    """The arithmetic of `unpack.centred`, rounded to the dtype after every operation."""
    pairs = torch.tensor(list(itertools.product(range(2**bits), repeat=2)))
    q, z = pairs.unbind(1)
    middle = 2 ** (bits - 1)
    if bits == 8 and dtype == torch.bfloat16:
        v, top = as_kernel(q & 127, dtype), as_kernel(~q & 128, dtype)
        symmetric = v - top
        general = symmetric - (as_kernel(z & 127, dtype) - as_kernel(~z & 128, dtype))
    else:
        v = as_kernel(q, dtype)
        symmetric = v - float(MAGIC[dtype][1] + middle)
        general = v - as_kernel(z, dtype)
    assert torch.equal(symmetric.double(), (q - middle).double())
    assert torch.equal(general.double(), (q - z).double())


def test_the_emulator_is_not_blind() -> None:
    a, b, c = (torch.tensor([x]) for x in (0b1100, 0b1010, 0b0110))
    assert lop3(a, b, c, 0xEA).item() == (0b1100 & 0b1010) | 0b0110
    assert lop3(a, b, c, 0x96).item() == 0b1100 ^ 0b1010 ^ 0b0110
    word = torch.tensor([0x89ABCDEF])
    text = "{\n" + "\n".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, $8;" for i in range(4)) + "\n}"
    assert [int(x) for x in run_ptx(text, {"$8": word})] == [0xCDEF, 0x89AB] * 4
    with pytest.raises(AssertionError):
        run_ptx("{\nprmt.b32 t, $8, $8, 0;\n}", {"$8": word})
