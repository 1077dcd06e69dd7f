"""Triton kernels, installed as bmsn.kernels; imported by the ops when a call runs on Triton, never on a CPU host.

Launchers check nothing and allocate no results: the op has checked, and hands over what they fill.
"""
