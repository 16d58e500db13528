"""Upcycling: every skill starts as a copy of a dense encoder, ours or one of a library."""
