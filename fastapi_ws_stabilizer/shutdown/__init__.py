"""How a manager stops."""
