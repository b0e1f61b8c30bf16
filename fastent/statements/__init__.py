"""The paper's mathematical statements (its Table 6), each as a check that a machine makes."""
