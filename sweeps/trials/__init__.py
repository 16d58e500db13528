"""Trials through Ray Tune: input, processes, outcomes and the ledger."""
