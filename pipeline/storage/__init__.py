"""Reads and writes local folders and object stores through the same few functions; import `storage.storage`."""
