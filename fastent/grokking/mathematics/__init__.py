"""The paper's mathematical statements (its Table 6), each as a check that a machine makes.

Imports the library, `fastent.reference`, the trainer and the experiments' statistics and palette.
"""
