"""Primitives below every other package: atomic directories, kernel locks and entry points.

``kernel_lock`` locks open files, ``temporary`` makes files and directories that a kill cannot leave
behind for ever, ``commit`` gives a finished directory its name. They raise ``OSError``.
``entry_points`` finds the objects behind names. This package imports no other package.
"""
