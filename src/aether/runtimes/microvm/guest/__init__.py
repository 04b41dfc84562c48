"""What runs inside of a microVM: its kernel, its first program, and a root file system per language."""
