"""`hf_attn_patch.image_free` is `hf_attn_patch.forward.needs.image_free`."""

import sys

from hf_attn_patch.forward.needs import image_free

sys.modules[__name__] = image_free
