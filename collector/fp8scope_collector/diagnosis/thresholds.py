"""Where the rules draw their lines, and why there.

"Measured" means: the demo's GPT (4 layers, width 96; 3 seeds, 150 steps each under AmaxScaling, CurrentScaling and
DelayedScaling with histories of 1024 and 16), in which nothing is wrong. docs/diagnosis.md has the same table.
Rows are recorded steps of one tensor on one rank.
"""

from __future__ import annotations

# Episodes -----------------------------------------------------------------------------------------------------------
GAP_ROWS = 16  # quiet rows that end an episode: a fault that comes back sooner is the same one
DATED_BACK_ROWS = 16  # at most, from the row in which a rule is sure to the one in which it began
SHOWN_PER_RULE = 8  # tensors of one rule in the command's text; --json has all
MAX_FINDINGS = 1000  # of one run; the worst are kept and the others counted

# Shares of elements -------------------------------------------------------------------------------------------------
# Just-in-time scaling comes from the tensor itself, so a single clipped element is a fault; no threshold.
OVERFLOW_RATIO = 1e-4  # FP8-LM allows 1e-5 (arXiv 2310.18313); measured: delayed scaling has 1e-5 in 6 rows of 8
OVERFLOW_ELEMENTS = 8  # in a row: of a small tensor a single element is more than that share
OVERFLOW_ROWS = 6  # of the last 8, so that a gap does not hide it
OVERFLOW_AT_ONCE = 0.05  # in one row; measured 1.4 % (gradients that spiked beyond a history of 16)
OVERFLOW_CRITICAL = 0.2  # three exponents too high clip 35 % of a normal distribution and cost 24 dB
CONSTANT_OVERFLOW_RATIO = 1e-3  # a constant one exponent too high clips 0.026 % of a normal one and costs 0.2 dB
UNDERFLOW_RATIO = 0.05  # of the non-zero elements: the SQNR of a normal distribution has then dropped 3 dB
UNDERFLOW_CRITICAL = 0.5  # most of the tensor is gone
UNDERFLOW_ROWS = 3  # in a row; the first row of delayed scaling (scale 1) is not counted

# Scales -------------------------------------------------------------------------------------------------------------
FROZEN_ROWS = 4  # rows in which the scale stays although the recipe would have moved it
FROZEN_BITS = 1.0  # beyond what the recipe leaves; a power of two is at most one bit off
REACTION = 1.001  # delayed scaling: the amax before is in the history, so the scale allows for it up to rounding
REACTION_OF_RANKS = 2.0  # the same for inputs and gradients of several ranks, where DDP may hand out rank 0's history
PINNED_BITS = 3.0  # the history's largest amax above everything in the last rows
PINNED_ROWS = 4  # rows that must lie below it
PINNED_BY_BITS = 2.0  # fall of the scale in one row that begins it: measured 2.7 once, by a real spike of a gradient
PINNED_SHARE = 1 / 3  # of the format's normal range (E4M3: 4.9 bits, E5M2: 9.9) lost: a warning, below it info
WASTED_SHARE = 1 / 2  # of the format's normal range unused above the largest element
WASTED_ROWS = 16  # in a row, since nothing is lost yet
WEIGHT_JUMP_BITS = 2.0  # of a weight's amax in one step: FP8-AMAX's weights move by 1; measured 0.03
WEIGHT_JUMP_CRITICAL_BITS = 6.0  # no optimizer step does that
FLAP_BITS = 2.0  # a move of an input's or weight's scale; measured at most 1
FLAPS = 4  # moves of that size in both directions within the last 16 rows

# Trends -------------------------------------------------------------------------------------------------------------
SETTLED_ROWS = 32  # of a process life that trends leave out: learning-rate warm-up, weights that begin at zero
GRADIENT_RISE_BITS = 3.0  # of a late layer's gradient over its mean: arXiv 2309.17224 shows spikes of 1 or 2
GRADIENT_RISE_ROWS = 4  # in a row: measured 1.9 bits over four rows, but 8 in a single one
WEIGHT_GROWTH_BITS = 0.125  # of a weight's amax a step, over 4 rows: measured 0.025
INPUT_DOUBLING_BITS = 0.5  # of an input's amax in each of 4 rows above the 32 before; measured 0.14 (300 steps)
INPUT_DOUBLED_BITS = 1.0  # of an input's amax above the 32 rows before the last two
INPUT_RISING_BITS = 0.25  # and of the first of these two; measured 0.15, the second then 0.23 (300 steps)
INPUT_RISE_BITS = 0.5  # and within these 4 or 2 rows
INPUT_GROWTH_BITS = 2.0  # of an input's amax within 64 rows, twice doubled: measured 1.0
DEPTH_BITS = 3.0  # between the first or last layer and the median of those between
DEAD_ROWS = 4  # rows of zeros alone; a zero-initialised layer has its first rows so

# Loss ---------------------------------------------------------------------------------------------------------------
LOSS_ROWS = 32  # steps that make the reference
LOSS_SPREADS = 6.0  # of the reference's spread (median deviation as a standard deviation)
LOSS_SHARE = 0.3  # and of the reference itself: measured 0.22, 2.7 spreads
MOVED_BITS = 2.0  # a tensor that moved before the loss did

# Rows and ranks -----------------------------------------------------------------------------------------------------
RANK_SILENT_ROWS = 5  # rows of other ranks
SPLIT_BITS_INPUT = 2.0  # between the means of 16 rows of one rank and of the median rank
SPLIT_BITS_GRAD = 4.0  # gradients of different data differ more
SILENT_S = 300.0  # since a rank was heard last; outlasts a collector's restart and the agents' longest pause (10 s)
