"""Object stores that fail, lie or lead astray."""
