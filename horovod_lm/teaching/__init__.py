"""Tools for instructors: notebook runner and checks, classroom, simulated hosts."""
