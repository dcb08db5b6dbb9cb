"""Kernels in Triton for NVIDIA GPUs, compiled at their first call for the shapes that they meet.

Owns the kernels, how they are cut for a device, and the files of measured cuts. Knows tensors only. Invariant: a
call writes to its outputs and to the slots or blocks that it was given, nothing else, and waits for nothing.
``kernels.triton.backend`` has the class. With ``TRITON_INTERPRET=1`` set before Triton is imported, all of it
runs on the CPU, slowly: this is how the tests prove it without a GPU.
"""
