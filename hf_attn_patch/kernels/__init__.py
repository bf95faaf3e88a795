"""Executors: who can run a `Program`, and the one entry point `attention(program, impl=)`.

Choosing: a forced ``impl`` runs or raises with the reason, it never falls back. ``auto`` takes the first of
triton, torch, reference that can run the program, and reports why the ones before it were passed over.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call.program import Program
from .hidden_keys import trimmed
from .reference import gated

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")
_ORDER = ("triton", "torch", "reference")
_MODULES = {"reference": "reference", "torch": "torch_blocks", "triton": "triton"}


class UnsupportedProgram(RuntimeError):
    """A forced executor cannot run a program; the message says why."""


@dataclass
class Result:
    """Outcome of `attention`.

    output: [B, H, L, Dv]. weights: edited probabilities [B, H, L, S] if asked for, else None.
    executor: the one that ran. reason: why this one (one line for reports).
    """

    output: Tensor
    weights: Tensor | None
    executor: str
    reason: str


def check_impl(impl: str) -> str:
    """Validate an implementation name.

    Raises:
        ValueError: unknown name.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    return impl


OLDEST_TRITON = (3, 6)  # as in pyproject's extra; torch 2.6 pins 3.2
_missing: dict[str, str | None] = {}  # "triton" -> why it cannot be used, once that was asked
_loaded: dict[str, Any] = {}  # a plain dict: torch.compile can read it, and cannot import


def executor(name: str) -> Any:
    """The executor module `name`, imported on first use (triton only when it is asked for and present)."""
    if name not in _loaded:
        _loaded[name] = importlib.import_module(f".{_MODULES[name]}", __name__)
    return _loaded[name]


def prepare(device: torch.device) -> None:
    """Import every executor that may be chosen on `device`, so that no forward has to (torch.compile cannot)."""
    for name in _ORDER:
        if unavailable(name, device, forced=False) is None:
            executor(name)


def _without_triton() -> str | None:
    """Reason the Triton kernels cannot be imported, or None; asked once."""
    if "triton" not in _missing:
        reason = None
        if importlib.util.find_spec("triton") is None:
            reason = "triton is not installed (pip install 'hf_attn_patch[triton]')"
        else:
            found = importlib.metadata.version("triton")
            if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
                oldest = ".".join(map(str, OLDEST_TRITON))
                reason = f"triton {found} is installed, the kernels need {oldest} (torch pins the one it comes with)"
        _missing["triton"] = reason
    return _missing["triton"]


def unavailable(name: str, device: torch.device, forced: bool = True) -> str | None:
    """Reason executor `name` can run nothing at all on `device`, or None; known before any forward.

    forced: somebody asked for it by name. The Triton interpreter runs on a CPU only then: it is slow.
    """
    if name == "triton":
        if device.type == "cpu" and not forced:
            return "the tensors are on cpu"
        if name not in _loaded and (reason := _without_triton()) is not None:
            return reason
        return executor(name).is_available(device)
    return None


def why_not(name: str, program: Program, forced: bool = True) -> str | None:
    """Reason executor `name` cannot run `program`, or None if it can."""
    if (reason := unavailable(name, program.query.device, forced)) is not None:
        return reason
    if program.need_weights and name != "reference":
        return "attention probabilities were asked for, only the reference executor keeps them"
    return executor(name).why_not(program)


def attention(program: Program, impl: str = "auto") -> Result:
    """Run one attention call.

    Args:
        program: the call. impl: ``auto``, or a forced executor: ``reference``, ``torch``, ``triton``.

    Raises:
        ValueError: unknown `impl`.
        UnsupportedProgram: the forced executor (or, with auto, every executor) refuses, with the reason.
    """
    check_impl(impl)
    call, program = program, trimmed(program)
    refusals: list[str] = []
    for name in _ORDER if impl == "auto" else (impl,):
        reason = why_not(name, program, impl != "auto")
        if reason is None:
            output, weights = executor(name).run(program)
            if program.addition is not None:
                output = output + gated(program, program.addition).to(output.dtype)
            for gate in call.output_gates:
                output = output * gate(call, output).to(output.dtype).transpose(1, 2).unsqueeze(-1)
            text = "forced" if impl != "auto" else "; ".join(refusals) or "first choice"
            if not call.need_weights or weights is None:
                return Result(output, None, name, text)
            hidden = call.key.shape[2] - weights.shape[3] if call is not program else 0
            return Result(output, call.of_tokens(pad(weights, (0, hidden))), name, text)
        refusals.append(f"not {name}: {reason}")
    raise UnsupportedProgram(f"impl={impl!r} cannot run {program}: {'; '.join(refusals)}")
