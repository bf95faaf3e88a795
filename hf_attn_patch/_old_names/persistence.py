"""`hf_attn_patch.persistence` is `hf_attn_patch.install.adapters`."""

import sys

from hf_attn_patch.install import adapters

sys.modules[__name__] = adapters
