"""What a caller may give for a plan: names, mappings and YAML files."""
