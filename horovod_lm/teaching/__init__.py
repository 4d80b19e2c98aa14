"""Tools for instructors: notebook runner, classroom, simulated hosts."""
