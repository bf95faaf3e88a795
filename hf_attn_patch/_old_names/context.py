"""`hf_attn_patch.context` is `hf_attn_patch.forward.context`."""

import sys

from hf_attn_patch.forward import context

sys.modules[__name__] = context
