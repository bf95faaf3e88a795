"""`hf_attn_patch.program` is `hf_attn_patch.call.program`."""

import sys

from hf_attn_patch.call import program

sys.modules[__name__] = program
