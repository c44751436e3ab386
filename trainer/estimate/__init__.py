"""Parameters, memory and operations of a model, by arithmetic."""
