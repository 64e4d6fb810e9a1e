"""Campaigns, targets and oracles."""
