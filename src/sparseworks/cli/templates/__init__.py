"""What `sparseworks new-method` writes, as files that run: a method and its test of each kind.

The words `own_method`, `own-method` and `OwnMethod` in them become the user's name.
"""
