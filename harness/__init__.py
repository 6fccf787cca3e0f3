"""FlashTune: the fastest configuration of an attention kernel that is proved to compute attention.

Importing this package imports neither torch nor triton.
"""

__version__ = "0.1.0"
