"""Transforms from raw records to the columns of a shard, with one module per modality.

Each module has a function that decodes the bytes of a media file (``decode_image`` …) and one that
computes the input of the model. Preparation, prediction and search all call these functions.
"""
