"""Write the torch program: one module for each family of operations, registered by name."""
