"""`Team`: the processes that ``accelerate launch`` started, which share the batches of one run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(
    hours=24
)  # a process that finished early waits for the slowest; torch's own limit is 30 minutes


class TeamError(ValueError):
    """The processes cannot work together; the message names the way out."""


@dataclass(frozen=True)
class Team:
    """rank: of this process, 0 … size - 1; rank 0 writes."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Returns when every process is here."""
        if self.size > 1:
            _state().wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """`value` (picklable) of every process, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


def find(model: Any = None) -> Team:
    """The team this process belongs to; alone unless ``WORLD_SIZE`` says that it was launched with others.

    Args:
        model: on a CPU, the processes talk through gloo even where there is a GPU.

    Raises:
        TeamError: WORLD_SIZE > 1 without accelerate.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Team()
    state = _state(cpu=model is not None and model.device.type == "cpu")
    return Team(state.process_index, state.num_processes)


def is_main() -> bool:
    """True in the process that prints and writes; read from the environment, nothing is started."""
    return int(os.environ.get("RANK", "0")) == 0


def _state(cpu: bool = False) -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise TeamError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: sharing a run needs accelerate: pip install "
            "'hf_attn_patch[eval]'. Or start one process."
        ) from error
    return PartialState(cpu=cpu, timeout=PATIENCE)
