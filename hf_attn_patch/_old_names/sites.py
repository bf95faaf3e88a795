"""`hf_attn_patch.sites` is `hf_attn_patch.model.sites`."""

import sys

from hf_attn_patch.model import sites

sys.modules[__name__] = sites
