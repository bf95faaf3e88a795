"""`hf_attn_patch.context` is `hf_attn_patch.forward`: context, running, needs.images."""

from hf_attn_patch.forward.checkpointing import FACTS, in_backward
from hf_attn_patch.forward.context import Context, copy_with_model
from hf_attn_patch.forward.conversation import MEMORY
from hf_attn_patch.forward.needs import BY_NAME as NEEDS
from hf_attn_patch.forward.needs.images import image_token_ids
from hf_attn_patch.forward.running import Running

__all__ = [
    "FACTS",
    "MEMORY",
    "NEEDS",
    "Context",
    "Running",
    "copy_with_model",
    "image_token_ids",
    "in_backward",
]
