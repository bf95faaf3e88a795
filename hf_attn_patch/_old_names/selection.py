"""`hf_attn_patch.selection` is `hf_attn_patch.model.selection`."""

import sys

from hf_attn_patch.model import selection

sys.modules[__name__] = selection
