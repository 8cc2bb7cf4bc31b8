"""Key tables, one TOML file each: how the tensors of a published layout map onto our modules."""
