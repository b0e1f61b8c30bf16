"""Triton kernels of fastent and their launchers (torch and triton alone)."""
