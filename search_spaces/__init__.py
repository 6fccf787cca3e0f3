"""What may vary in each kernel. `search_spaces/NAME.py` belongs to `kernels/NAME.py` and exports two functions:

`space(problem, device)`    the tunables and the named rules that say which combinations are legal;
`default(problem, device)`  a legal config that compiles without spills, for when nothing better is known.

Parameters are named after the keyword-only tunables of the kernel's `launches`. Nothing here imports torch or triton.
"""
