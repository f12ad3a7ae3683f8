"""What runs inside the sandbox: the fork server, and the judge and candidate that it forks.

The standard library alone, imported as the top-level package `inside`, so that nothing else of this
project is in the memory that foreign code can read.
"""
