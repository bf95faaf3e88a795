"""torch.export: what cannot be traced is refused in our words, not in those of a symbolic shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import PatchError


def exported(names: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` while torch.export traces.

    names: of the methods that run there.

    Raises:
        PatchError: what they do depends on values of tensors, which a trace does not know.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    unknown = (
        DataDependentOutputException,
        DynamicOutputShapeException,
        GuardOnDataDependentSymNode,
        UnsupportedOperatorException,
    )
    try:
        return function(*args)
    except (*unknown, RuntimeError) as error:
        if not isinstance(error, unknown) and "tensor subclasses" not in str(
            error
        ):  # .numpy(), .tolist() of a trace
            raise
        raise PatchError(
            f"{names}: what is read depends on the values of tensors, which torch.export does not know, so this model "
            "cannot be exported with it. Export it unpatched (handle.disabled()), or run it with torch.compile, which "
            "breaks its graph there"
        ) from error
