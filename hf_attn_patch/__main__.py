"""``python -m hf_attn_patch``: the command line."""

from hf_attn_patch.cli import main

if __name__ == "__main__":
    main()
