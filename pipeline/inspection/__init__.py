"""Tells what a run folder holds: status, verification, exports. Reads only."""
