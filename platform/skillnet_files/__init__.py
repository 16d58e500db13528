"""Primitives below every other package: atomic directories, kernel locks and entry points.

``commit`` locks open files, makes temporary files and directories that a kill cannot leave behind
for ever, and gives a finished directory its name. It raises ``OSError``.
``entry_points`` finds the objects behind names. This package imports no other package.
"""
