"""Primitives of files on a disk, for every other package: atomic directories and kernel locks.

``kernel_lock`` locks open files, ``temporary`` makes files and directories that a kill cannot leave
behind for ever, ``commit`` gives a finished directory its name. It imports no other package and
raises ``OSError``.
"""
