"""Where Triton cannot be installed (anything but Linux on x86-64) there is no kernel to test."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
