"""Training steps on fake CUDA tensors, which have shapes, types and devices but no values.

No GPU and no CUDA build of torch is needed. :mod:`tests.helpers.fake_cuda.census` is the entry
point; it runs in a process of its own, because the fake device would stay for other tests.
"""
