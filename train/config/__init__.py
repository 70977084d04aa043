"""How settings are read: YAML files, keys, and messages that name what was meant."""
