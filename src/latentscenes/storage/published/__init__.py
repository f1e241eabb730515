"""Libraries as static files: their format, writing and reading. May import storage and what it imports."""
