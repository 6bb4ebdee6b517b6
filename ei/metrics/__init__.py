"""How good predictions are, and how sure of that one can be. Arrays in, numbers out."""
