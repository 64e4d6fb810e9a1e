"""The commands that the kernel brings; each module is imported when its command is called."""
