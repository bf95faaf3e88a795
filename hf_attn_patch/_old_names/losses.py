"""`hf_attn_patch.losses` is `hf_attn_patch.forward.needs.losses`; `aux_losses` is `hf_attn_patch.aux_losses`."""

from hf_attn_patch.forward.needs.losses import Losses
from hf_attn_patch.install.state import aux_losses

__all__ = ["Losses", "aux_losses"]
