"""What every room may use: errors, registries, sizes, data types, files, tables, provenance. Imports no torch."""
