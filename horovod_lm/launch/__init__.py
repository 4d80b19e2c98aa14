"""Starting jobs on several hosts."""
