"""Measurements of GPUs in parts, of which each keeps what it has measured; see ``make gpu``."""
