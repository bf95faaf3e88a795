"""``hf-attn-patch``: list, look, plan, measure, demo.

Commands import what they need when they run, so that ``--help`` and ``list`` start without torch.
"""

from __future__ import annotations

import sys
from typing import Any


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; our own errors are one line and exit code 2, ``--debug`` shows where they come from."""
    from .app import app

    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    try:
        return app(given, standalone_mode=True)
    except Exception as error:
        if debug or not is_ours(error):
            raise
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/red] {escape(str(error))}")
        raise SystemExit(2) from None


def is_ours(error: BaseException) -> bool:
    """True for errors whose message is made for users: of this package, or ValueError from one of its modules."""
    from ..errors import PatchError
    from ..testbed import TestbedError

    if isinstance(error, (PatchError, TestbedError)):
        return True
    if not isinstance(error, ValueError):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return str(name).startswith("hf_attn_patch.")
