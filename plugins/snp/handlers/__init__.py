"""What the SNP commands do, by kind of command."""
