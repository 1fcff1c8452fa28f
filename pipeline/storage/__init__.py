"""Local folders and object stores behind the same few functions; `storage` is the door."""
