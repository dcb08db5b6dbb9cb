"""Kernels in C++ for the CPU, built with the system's compiler at first use and called through ctypes.

Owns its sources, their build and the thread pool behind the calls. Knows tensors, not torch's C++ side: only
data pointers cross. Invariant: a call writes to its outputs and to the slots that a batch names, nothing else.
``kernels.cpu.backend`` has the class, ``python -m kernels.cpu.build`` builds ahead of the first use.
"""
