"""The published comparison, run again: grids of ordinary runs, and their figures beside the paper's."""
