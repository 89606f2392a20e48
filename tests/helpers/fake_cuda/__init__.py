"""A CUDA device that does not exist, for tests of the GPU path on any machine; docs/internals/fake-gpu.md explains it.

`install` must run before torch is imported, and it changes torch for the whole process, so tests run
`python -m tests.helpers.fake_cuda` as a process of its own and read the report that it prints.
"""
