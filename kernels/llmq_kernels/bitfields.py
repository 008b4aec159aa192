"""Which bits of which word hold a code: the definition that packing and unpacking share.

The unit of unpacking is an element: one, two or three words of a lane that hold whole 16-column
fragments of the left operand of `mma.m16n8k16`. A lane has eight codes of each fragment.
"""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """Where some bits of a code are: in which of an element's words, and from which bit on.

    That is the place of even columns; the next column's bits sit 16 above.
    """

    word: int
    bit: int
    width: int


# 3 bits: five codes in each half of a word, and the top bits of three words make the sixteenth.
# Codes of rows 0..7 of a tile start at bits 0, 6 and 12, those of rows 8..15 three bits above.
_LOW = ((0, 0), (0, 6), (1, 0), (1, 6), (1, 12), (2, 0), (2, 6), (2, 12))
_HIGH = ((0, 3), (0, 9), (0, 12), (1, 3), (1, 9), (2, 3), (2, 9))
_TOP = (Piece(1, 15, 1), Piece(2, 15, 1), Piece(0, 15, 1))


def parts(bits: int) -> int:
    """16-column fragments that an element holds: the words that a lane unpacks together."""
    return {2: 2, 3: 4}.get(bits, 1)


def words_per_element(bits: int) -> int:
    """Words that an element has."""
    return {3: 3, 8: 2}.get(bits, 1)


def pieces(bits: int, part: int, h2: int, half: int) -> tuple[Piece, ...]:
    """The bits of one code of an element, lowest first.

    Args:
        bits: 2, 3, 4 or 8.
        part: which of the element's fragments.
        h2: columns 0..7 or 8..15 of the fragment.
        half: rows 0..7 or 8..15 of the tile of 16.
    """
    if bits == 8:
        return (Piece(h2, 8 * half, 8),)
    if bits == 3:
        at = 2 * part + h2
        if half and at == len(_HIGH):
            return _TOP
        return (Piece(*(_HIGH if half else _LOW)[at], 3),)
    return (Piece(0, bits * (4 * part + 2 * h2 + half), bits),)


def shift(bits: int, word: int, bit: int) -> int:
    """How far a word goes right so that the piece at `bit` ends in its lowest eight bits.

    Codes share shifts. Those of 3 bits move the three tops of a word to where they make a code.
    """
    if bits != 3:
        return bit // 8 * 8
    if bit < 12:
        return bit // 6 * 6
    return 10 - next(i for i, top in enumerate(_TOP) if top.word == word)
