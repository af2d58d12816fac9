"""What every room may use: errors, registries, sizes, files. Imports no torch."""
