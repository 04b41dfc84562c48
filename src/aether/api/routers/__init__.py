"""Routes, one module per noun. Each ends with HANDLERS."""
