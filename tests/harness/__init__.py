"""Instruments that examine Triton kernels where there is no GPU, each with planted faults it must find."""
