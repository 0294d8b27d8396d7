"""The real code bases in the releases that they ask for, nothing of theirs changed: `./run real albef` and so on.

Each module builds the heads of one checkout, from its own classes and constructors, and names what they are given in
place of downloads (`standins`). `test_heads` holds every one of them to the same promises.
"""
