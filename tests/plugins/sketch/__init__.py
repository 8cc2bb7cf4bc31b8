"""A toy family of models in a package of its own; its README says how it is put together."""
