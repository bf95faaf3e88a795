"""`hf_attn_patch.masks` is `hf_attn_patch.call.mask`."""

import sys

from hf_attn_patch.call import mask

sys.modules[__name__] = mask
