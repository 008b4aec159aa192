"""Which number format options, or the entry of a report, stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmq.codebook import CodebookScheme
from llmq.errors import SchemeError
from llmq.scheme import QuantScheme
from llmq.superblocks import SuperBlockScheme


def scheme_from(entry: Mapping[str, Any]) -> QuantScheme:
    """The scheme of which `entry` holds the fields, such as one layer of a report."""
    plain = (entry["bits"], entry["group_size"], entry["symmetric"])
    if "kind" in entry:
        return SuperBlockScheme(*plain, kind=entry["kind"])
    if "book" in entry:
        return CodebookScheme(*plain, book=entry["book"], outliers=entry["outliers"])
    return QuantScheme(*plain)


def number_format(
    bits: int,
    group_size: int,
    symmetric: bool,
    book: str | None = None,
    outliers: float = 0.0,
    k_quants: bool = False,
) -> QuantScheme:
    """Integers, or a code book if one is named, or super-blocks, which say the rest themselves.

    Raises:
        SchemeError: see the classes; or options that do not go together.
    """
    if outliers and book is None:
        raise SchemeError(f"outliers={outliers}: only beside a code book (--codebook).")
    if k_quants and book is not None:
        raise SchemeError("K-quants and code books are two formats: give one of the two.")
    if book is not None:
        return CodebookScheme(bits, group_size, symmetric, book=book, outliers=outliers)
    if not k_quants:
        return QuantScheme(bits, group_size, symmetric)
    scheme = SuperBlockScheme.of_bits(bits)
    if group_size not in (QuantScheme().group_size, scheme.group_size):
        raise SchemeError(
            f"group_size={group_size}: {scheme.kind} has groups of {scheme.group_size}: leave "
            "--group-size away."
        )
    if scheme.symmetric and not symmetric:
        raise SchemeError(f"{scheme.kind} has no zero points: leave --asymmetric away.")
    return scheme
