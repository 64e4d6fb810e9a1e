"""What happens to a captured plain guest when it is encrypted."""
