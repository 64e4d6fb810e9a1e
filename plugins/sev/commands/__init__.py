"""Commands that need SEV; imported when they are called."""
