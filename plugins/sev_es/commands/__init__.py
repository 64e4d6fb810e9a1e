"""Commands that need SNP, SEV-ES and SEV; imported when they are called."""
