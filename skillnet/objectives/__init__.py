"""Objectives of tasks: one file each holds head, loss, predictions and metrics.

:mod:`skillnet.objectives.base` declares them without torch, and :mod:`skillnet.objectives.heads`
has the base class of their heads.
"""
