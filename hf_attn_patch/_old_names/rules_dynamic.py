"""`hf_attn_patch.rules_dynamic` is `hf_attn_patch.call.rules.dynamic`."""

import sys

from hf_attn_patch.call.rules import dynamic

sys.modules[__name__] = dynamic
