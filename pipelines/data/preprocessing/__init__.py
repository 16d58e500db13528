"""Preparation of corpora: rows of downloads or of external corpora become verified Arrow shards.

:func:`pipelines.data.preprocessing.prepare.prepare` is the entry point of ``skillnet prepare``. A
row passes these modules in order::

    blocks          read rows, cut them into blocks, one block per shard
    jobs            units of work: the blocks of a corpus; transform a block and write its shard
    pipeline        run the jobs in tasks: ray_tasks, or local_tasks for texts
    staging         finished shards on the disk (remote_staging: in an object store)
    progress        the driver's count, error rate and manifest

:mod:`pipelines.data.preprocessing.inspection` is the library of ``skillnet inspect``.
"""
