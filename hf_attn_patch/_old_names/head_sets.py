"""`hf_attn_patch.head_sets` is `hf_attn_patch.model.head_sets`."""

import sys

from hf_attn_patch.model import head_sets

sys.modules[__name__] = head_sets
