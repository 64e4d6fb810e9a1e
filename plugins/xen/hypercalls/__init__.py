"""The hypercalls, one module each; `table` names them all with their arguments as declared in C.

Source: Xen xen/include/hypercall-defs.c.
"""
