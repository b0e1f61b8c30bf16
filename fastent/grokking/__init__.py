"""The study of grokking: the paper's trainer, its experiments and its mathematics.

The library's first user: it imports the library and `fastent.reference`; nothing of the library imports it but the
command line, lazily.
"""

from fastent.installation import refuse_another

refuse_another()
