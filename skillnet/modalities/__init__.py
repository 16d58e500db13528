"""Tensor halves of the built-in modalities; :mod:`skillnet.modality` declares them."""
