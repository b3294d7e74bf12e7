"""Models, one file a family, each a construction of parts."""
