"""The demonstration: the whole job on the tiny preset, from nothing to scored answers and a running server."""
