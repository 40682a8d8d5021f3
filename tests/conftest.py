"""What pytest is not to import: a script for a process of its own, with eight devices."""

collect_ignore = ["sharding_script.py"]
