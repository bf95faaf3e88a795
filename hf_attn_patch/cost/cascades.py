"""Attention as a list of Einsums, and how many times each form of it has to walk over the keys.

Source: FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design, arXiv 2406.10491
(FPSG-UIUC/micro24-fusemax-artifact, READ; counts RAN against its numbers). Ranks: B, H, P queries, M keys, E and F
dimensions of a query and a value; a form in tiles has N keys inside a tile and M tiles.

A *pass* over M is one complete walk along the keys of a query that has to end before an Einsum that needs its result
may start to walk again. It belongs to the algorithm, not to the hardware: with more than one, scores are written out
and read again, or made again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Einsum:
    """``out[ranks without reduce] = sum or max over reduce of f(inputs)``; ranks: one letter each.

    running: a reduction that is useful before it is complete, because what was made with it is corrected later.
    costs: operations per iteration, by kind (mac, add, max, divide).
    """

    out: str
    inputs: tuple[str, ...]
    ranks: str
    reduce: str = ""
    running: bool = False
    costs: Mapping[str, int] = field(default_factory=dict)

    def iterations(self, sizes: Mapping[str, int]) -> int:
        """Product of the sizes of its ranks."""
        return math.prod(sizes[rank] for rank in self.ranks)


Cascade = tuple[Einsum, ...]


def passes(cascade: Cascade, rank: str = "M") -> int:
    """Walks over `rank` that `cascade` cannot do with fewer of."""
    walk: dict[str, int] = {}  # the walk in which a tensor that has the rank is made
    done: dict[str, int] = {}  # the walk at whose end a tensor without it is complete (0: needs none)
    most = 0
    for einsum in cascade:
        earlier = max((walk.get(name, 0) for name in einsum.inputs), default=0)
        complete = max((done.get(name, 0) for name in einsum.inputs), default=0)
        if rank not in einsum.ranks:
            done[einsum.out] = max(complete, earlier)
            continue
        number = max(1, earlier, complete + 1)
        if rank in einsum.reduce:
            done[einsum.out] = number - 1 if einsum.running else number
        else:
            walk[einsum.out] = number
        most = max(most, number)
    return most


def operations(cascade: Cascade, sizes: Mapping[str, int]) -> dict[str, int]:
    """Operations by kind, for ranks of these sizes."""
    total: Counter[str] = Counter()
    for einsum in cascade:
        for kind, count in einsum.costs.items():
            total[kind] += count * einsum.iterations(sizes)
    return dict(total)


_MAC, _MAX, _ADD = {"mac": 1}, {"max": 1}, {"add": 1}
_EXP = {"mac": 6, "add": 1}  # e^(x - max): a subtraction and six multiply-adds, as FuseMax counts it
_QK = Einsum("QK", ("Q", "K"), "BHMPE", "E", costs=_MAC)
_TOP = Einsum("m", ("QK",), "BHMP", "M", costs=_MAX)
_SN = Einsum("SN", ("QK", "m"), "BHMP", costs=_EXP)
_SD = Einsum("SD", ("SN",), "BHMP", "M", costs=_ADD)

CASCADES: dict[str, Cascade] = {
    # softmax as it is written: probabilities exist, then meet the values (eager PyTorch)
    "3-pass": (
        _QK, _TOP, _SN, _SD,
        Einsum("A", ("SN", "SD"), "BHMP", costs={"divide": 1}),
        Einsum("AV", ("A", "V"), "BHMPF", "M", costs=_MAC),
    ),
    # the division waits until the values are summed
    "2-pass": (
        _QK, _TOP, _SN, _SD,
        Einsum("SNV", ("SN", "V"), "BHMPF", "M", costs=_MAC),
        Einsum("AV", ("SNV", "SD"), "BHPF", costs={"divide": 1}),
    ),
    # a running maximum per tile, what was summed before is scaled down when it grows (FlashAttention, our kernels)
    "1-pass": (
        Einsum("QK", ("Q", "K"), "BHMNPE", "E", costs=_MAC),
        Einsum("LM", ("QK",), "BHMNP", "N", costs=_MAX),
        Einsum("RM", ("LM",), "BHMP", "M", running=True, costs=_MAX),
        Einsum("SLN", ("QK", "RM"), "BHMNP", costs=_EXP),
        Einsum("SLD", ("SLN",), "BHMNP", "N", costs=_ADD),
        Einsum("SLNV", ("SLN", "V"), "BHMNPF", "N", costs=_MAC),
        Einsum("PRM", ("RM",), "BHMP", costs=_EXP),
        Einsum("SPD", ("PRM", "SLD"), "BHMP", costs=_MAC),
        Einsum("RD", ("SLD", "SPD"), "BHMP", "M", running=True, costs=_ADD),
        Einsum("SPNV", ("PRM", "SLNV"), "BHMPF", costs=_MAC),
        Einsum("RNV", ("SLNV", "SPNV"), "BHMPF", "M", running=True, costs=_ADD),
        Einsum("AV", ("RNV", "RD"), "BHPF", costs={"divide": 1}),
    ),
}  # fmt: skip
