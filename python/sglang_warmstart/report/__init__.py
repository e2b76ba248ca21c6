"""The report on a start: what was compiled and when, and where the seconds went."""
