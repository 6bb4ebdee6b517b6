"""A run on disk: what lies where, how it begins, what it leaves, and how it is read back."""
