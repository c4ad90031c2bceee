"""Guards: what a recording holds under.

A cell is a Python object, and what its step reads may change: in the cell (`fingerprint`), and in globals, closures and
objects outside of it (`environment`). What lies outside is found by watching one step of a copy of the cell (`twin`,
`watch`): the code that runs names what it can read (`names`), which leads on through objects of several `kinds`
(`reach`) to `places`, whose values are compared at every call. That nothing of a step before is read is proved by
recording several on one twin (`scratch`). In comes a cell with arguments for a step; out comes a fingerprint, equal at
two calls only if a plan made at one holds at the other. Most calls need none: a `look` at what the fingerprint was made
of says whether it would be the same.
"""
