"""From raw records to the columns of a shard, one file a modality.

Each file has a border function that reads a media file's bytes (``decode_image`` …) and one that
makes what the model reads. Prepared shards, predictions and searches all go through them.
"""
