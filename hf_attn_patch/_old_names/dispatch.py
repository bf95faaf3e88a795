"""`hf_attn_patch.dispatch` is `hf_attn_patch.install`: attach, dispatch, names, stack."""

from hf_attn_patch.install.attach import attach, configs_of, detach, dispatched, set_implementation
from hf_attn_patch.install.dispatch import attention_forward, mask_function, register, registered
from hf_attn_patch.install.names import CHILD, EAGER_NAME, NAME
from hf_attn_patch.install.stack import Call, PatchStack, SitePatch, stacks_of

__all__ = [
    "CHILD",
    "EAGER_NAME",
    "NAME",
    "Call",
    "PatchStack",
    "SitePatch",
    "attach",
    "attention_forward",
    "configs_of",
    "detach",
    "dispatched",
    "mask_function",
    "register",
    "registered",
    "set_implementation",
    "stacks_of",
]
