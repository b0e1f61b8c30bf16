"""The paper's experiments: their jobs, their analyses and the report on runs that exist.

Imports the library, `fastent.reference`, the trainer, SciPy, Matplotlib and PyArrow.
"""
