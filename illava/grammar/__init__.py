"""Holds answers to grammars: which grammars can be, what may come next, and the mask of that on the device."""
