"""`PatchCallback`: one line in a Trainer script for the checks and the log of auxiliary losses."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..api import active
from ..errors import PatchError
from ..install.state import aux_losses
from .checks import broken_gradient, check_trainable, nan_guard


class PatchCallback(TrainerCallback):
    """``Trainer(..., callbacks=[PatchCallback()])``.

    At the start it refuses a model in which nothing learns, or a patch does not. While training it stops at a loss or a
    gradient that is not finite and names the layer (Trainer itself logs the average of earlier steps instead). Logs get
    one entry per auxiliary loss, e.g. ``moh.balance``, of the last forward.

    Raises:
        PatchError: (from ``trainer.train()``) see above.
    """

    def __init__(self) -> None:
        self._guard: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        check_trainable(model)
        self._close()
        self._guard = nan_guard(model)
        self._guard.__enter__()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        if args.fp16:  # there a gradient scaler looks for infinities, and skips the step
            return
        if (name := broken_gradient(model)) is not None:
            raise PatchError(
                f"the gradient of {name} is not finite in step {state.global_step + 1}, the loss was. Lower the "
                "learning rate, clip gradients (max_grad_norm), or train in a wider number format"
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **more: Any
    ) -> None:
        if not logs or "loss" not in logs or not active(model):
            return
        values = {name: round(float(value.detach()), 5) for name, value in aux_losses(model).items()}
        logs.update(values)
        if state.log_history:  # written before callbacks are asked
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
            self._guard = None

    def __del__(self) -> None:  # a training that raised never reaches its end
        self._close()
