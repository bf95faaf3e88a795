"""Names under which this package is known to transformers, to modules and to models."""

NAME = "hf_attn_patch"
# A model loaded with eager attention may compute with its (float) mask, one loaded with sdpa with a bool mask:
# the mask function must know which, and transformers gives it nothing but the name.
EAGER_NAME = f"{NAME}_eager"
CHILD = "attn_patch"  # child of a patched attention module
STATE = "_attn_patch_state"  # attribute of a patched transformers model
