"""The sizes of grids that kernels of both languages aim at."""

SMS = 132  # of an H200

# Kernels that sum over blocks write a row of partial sums each, which a second pass reads. Each SM
# runs four such blocks, so that all end at about the same time.
TARGET_BLOCKS = 4 * SMS
