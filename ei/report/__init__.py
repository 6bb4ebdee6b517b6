"""The report of a run, alone or against another: files in, one HTML page out."""
