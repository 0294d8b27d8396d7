"""Stand-ins with the structure of hosts that no package ships: ALBEF and mPLUG, small, with random weights.

They have the parts, arguments and order of execution that the adapters rely on (which module calls which, with what,
when), and none of the code. Head classes and attributes carry other names than in the originals on purpose: a copied
file with renamed parts must be recognised by its structure.
"""
