"""Several methods under one protocol: trained cell by cell, and one table of all."""
