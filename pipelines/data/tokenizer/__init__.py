"""Tokenizer of text and code: training, conversion of existing tokenizers, and selection.

All corpora of a directory share one tokenizer, because one model reads them all.
"""
