"""Configuration dataclasses of the commands; they validate their values and read no files."""
