"""One module per kind of file: how it is opened without trusting it, and what its numbers mean."""
