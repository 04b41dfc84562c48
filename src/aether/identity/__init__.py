"""Who is calling: tokens, roles and sessions."""
