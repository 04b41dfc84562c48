"""What the drivers for a single machine share: a SQLite file of many processes, its wakes, and a clock."""
