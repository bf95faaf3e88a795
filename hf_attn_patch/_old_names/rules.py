"""`hf_attn_patch.rules` is `hf_attn_patch.call.rules`."""

import sys

from hf_attn_patch.call import rules

sys.modules[__name__] = rules
