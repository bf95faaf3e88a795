from .row_blocks import run_rows
def run_plain(program):
    return run_rows(program)
