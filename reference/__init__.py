"""The mathematics of fastent in plain NumPy: slow, obvious, independent of torch."""
