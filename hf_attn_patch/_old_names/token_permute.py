"""`hf_attn_patch.token_permute` is `hf_attn_patch.call.token_permute`."""

import sys

from hf_attn_patch.call import token_permute

sys.modules[__name__] = token_permute
