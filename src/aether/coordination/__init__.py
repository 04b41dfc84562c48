"""What is built on the key-value port alone, so that it means the same on every driver: leases that are kept alive,
elections, and views that follow what is under a prefix."""
