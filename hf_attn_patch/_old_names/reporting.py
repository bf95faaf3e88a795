"""`hf_attn_patch.reporting` is `hf_attn_patch.install.report`."""

import sys

from hf_attn_patch.install import report

sys.modules[__name__] = report
