"""Record formats of annotation files: JSON, JSON lines, CSV, TSV, Parquet and Arrow.

Readers of :mod:`pipelines.data.corpora.readers` call :func:`record_reader.read_records`. A record
that cannot be read becomes a ``BadRecord`` in its place, so one damaged line never costs a corpus.
"""
