"""Where a plan acts: the tower's reduction call, the decoder's, and what both know of tokens and places."""
