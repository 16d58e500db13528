"""Studies: every system tuned equally, then trained with several seeds."""
