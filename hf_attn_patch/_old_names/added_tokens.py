"""`hf_attn_patch.added_tokens` is `hf_attn_patch.forward.needs.added_tokens`."""

import sys

from hf_attn_patch.forward.needs import added_tokens

sys.modules[__name__] = added_tokens
