"""`hf_attn_patch.rules_grid` is `hf_attn_patch.call.rules.grid`."""

import sys

from hf_attn_patch.call.rules import grid

sys.modules[__name__] = grid
