"""What the demo measures: a language model and a vision model, dense beside patched, and the undo proof.

Every number of a row is measured in one process, on one model object, on the same items; patches go on and off the
live model. The record is plain data (`dict`), the command line prints it and `hf_attn_patch.report` draws it.
"""
