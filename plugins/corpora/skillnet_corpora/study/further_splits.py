"""Names of splits of the corpora that add rows to a task: further test rows, reserve, and pairs.

An evaluation reads by default the splits whose names start with "test". The reserve is read by the
final evaluation of a study only: ``skillnet compare --read_reserve once``.
"""

#: Added to the name of a split: further rows of the units that this split holds out.
MORE = "_more"
#: Rows of a voice, an artist or a package that no other split contains.
RESERVE = "reserve"
#: Texts and code of unlabelled functions, which only a task that names the split reads.
PAIRS = "pretrain_pairs"
