"""Stages that turn corpora into models, each of them a command."""
